"""The tables of docs/tpu.md: plans of two networks, one of them in two ways, on six chips.

    python docs/scripts/tpu_table.py plans --kinds=v4,v5e,v5p,v6e     # where jax[tpu] is installed
    python docs/scripts/tpu_table.py plans --kinds=a100,h100          # where jax[cuda13] is
    python docs/scripts/tpu_table.py plans --page=docs/tpu.md         # from what both have written

Each plan is `jax-diffusion plan` with the arguments below, its JSON kept in the folder PLANS: a second call makes only
those that are missing, and --page keeps the rows of those. All of them take hours of one core, most of it in the U-Net
for TPU.
"""

import argparse
import json
import pathlib
import subprocess
import sys

import page

BFLOAT16 = "--config.model.dtype=bfloat16"
TPUS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
GPUS = {"a100": "a100:1", "h100": "h100:1"}


def cases() -> dict[str, list[str]]:
    """Name: arguments. 512 images a chip of the U-Net, 32 of DiT-XL/2: four TPUs, and one GPU."""
    out = {}
    for kind, topology in {**TPUS, **GPUS}.items():
        chips = 4 if kind in TPUS else 1
        out[f"unet_{kind}"] = [
            "--config=cifar10_ddpm", BFLOAT16, f"--topology={topology}", f"--batch={512 * chips}", "--mesh=data=-1",
        ]  # fmt: skip
        for name, remat in (("dit", "full"), ("ditstored", "none")):
            out[f"{name}_{kind}"] = [
                "--config=imagenet256_dit_xl2", BFLOAT16, f"--config.model.remat={remat}", f"--topology={topology}",
                f"--batch={32 * chips}", "--mesh=fsdp=-1",
            ]  # fmt: skip
    return out


TITLES = {
    "unet": "DDPM's CIFAR-10 U-Net (`cifar10_ddpm`), bfloat16, 512 images a chip, data parallel",
    "dit": "DiT-XL/2 (`imagenet256_dit_xl2`), bfloat16, remat=full, 32 images a chip, FSDP over the chips",
    "ditstored": "The same without remat, its blocks not in a loop (docs/benchmarks.md)",
}


def table(network: str, plans: dict[str, dict], old: str) -> str:
    """old: the table so far, whose rows stay where there is no plan."""
    lines = [
        f"**{TITLES[network]}**",
        "",
        "| topology | memory a chip | of | img/s a chip | MFU | compute | memory | links | estimated cycles | limit |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for kind, topology in {**TPUS, **GPUS}.items():
        plan = plans.get(f"{network}_{kind}")
        if plan is None:
            kept = [row for row in old.splitlines() if row.startswith(f"| {topology} |")]
            lines.append(kept[0] if kept else f"| {topology} | not compiled |" + " |" * 8)
            continue
        e = plan["train"]
        gib = 2**30
        if e["images_per_s"] is None:
            lines.append(
                f"| {topology} | {e['bytes'] / gib:.1f} GiB | {e['capacity'] / gib:.1f} | does not fit |" + " |" * 6
            )
            continue
        ms = {k: f"{1e3 * v:.0f} ms" for k, v in e["seconds"].items()}
        last = ms.get("cycles", f"({ms['serial']} serial)")
        lines.append(
            f"| {topology} | {e['bytes'] / gib:.1f} GiB | {e['capacity'] / gib:.1f} | {e['images_per_s_chip']:,.0f} | "
            f"{e['mfu']:.0%} | {ms['compute']} | {ms['memory']} | {ms['collectives']} | {last} | {e['limit']} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", type=pathlib.Path, help="folder of the plans' JSON files")
    parser.add_argument("--kinds", default="", help="chips to compile for, of " + ", ".join({**TPUS, **GPUS}))
    parser.add_argument("--page", help="Markdown page whose parts are replaced")
    options = parser.parse_args()
    options.plans.mkdir(parents=True, exist_ok=True)
    wanted = options.kinds.split(",")
    for name, arguments in cases().items():
        out = options.plans / f"{name}.json"
        if name.rsplit("_", 1)[1] not in wanted or out.exists():
            continue
        command = [sys.executable, "-m", "jax_diffusion.cli.main", "plan", *arguments]
        print(" ".join(["jax-diffusion", "plan", *arguments]), flush=True)
        subprocess.run([*command, "--no_sampler", "--no_search", f"--out={out}"], check=True)
    plans = {path.stem: json.loads(path.read_text()) for path in options.plans.glob("*.json")}
    for network in TITLES:
        text = table(network, plans, page.part(options.page, network) if options.page else "")
        print(text, "\n")
        if options.page:
            page.insert(options.page, network, text)


if __name__ == "__main__":
    main()
