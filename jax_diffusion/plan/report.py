"""A plan as text. Takes estimates as the dicts of cost.Estimate.to_json, which is what `--out` holds too."""

from typing import Any

from jax_diffusion.train.report import count

GiB = 2**30
TITLES = {"train": "training step", "sample": "sampler"}
# What each line of the caveats is about, and when it is printed.
CAVEATS = {
    "tpu": "times are bounds from the compiler's estimated cycles, the chip's data sheet and the HLO: nothing was run. "
    "Estimated cycles know no collectives and no Pallas kernels, and rank variants better than they foretell speed.",
    "cuda": "times are the roofline of each kernel after another from the HLO and the chip's data sheet: nothing was "
    "run or autotuned. cuDNN's workspaces are not counted, and real kernels reach half to three quarters of this.",
    "cpu": "virtual devices: memory, FLOPs and collectives are those of any device, but nothing is known of time.",
}
LINKS = "Collectives are taken to use all links and to run beside computation."


def size(n: float) -> str:
    return f"{n / GiB:.2f} GiB" if n >= GiB / 10 else f"{n / 2**20:.2f} MiB" if n >= 2**20 / 100 else f"{n:.0f} B"


def milliseconds(seconds: float) -> str:
    return (
        f"{seconds:,.1f} s" if seconds >= 10 else f"{1e3 * seconds:,.1f} ms" if seconds >= 1e-3 else count(seconds, "s")
    )


def memory(e: dict[str, Any]) -> list[str]:
    whole = f" of {size(e['capacity'])}" if e["capacity"] else ""
    verdict = "" if not e["capacity"] else "fits: " if e["fits"] else "DOES NOT FIT: "
    lines = [f"  memory       {verdict}{size(e['bytes'])}{whole} a device"]
    if e["parts"]:
        lines.append("               " + ", ".join(f"{k} {size(v)}" for k, v in e["parts"].items() if v))
    return lines


def estimate(e: dict[str, Any]) -> str:
    """One program."""
    lines = [f"{TITLES[e['program']]}, batch {e['batch']:,} on {e['devices']} device(s), compiled in "
             f"{e['compile_seconds']:.0f} s", *memory(e)]  # fmt: skip
    if not e["flops"]:
        return "\n".join(lines)
    xla = f"; XLA's own count, loops once: {count(e['xla_flops'], 'FLOP')}" if e["xla_flops"] else ""
    lines.append(
        f"  work         {count(e['model_flops'], 'FLOP')} an image; a device does {count(e['flops'], 'FLOP')}{xla}"
    )
    lines.append(f"  traffic      {count(e['traffic'], 'B')} of memory a device")
    for kind, c in e["collectives"].items():
        lines.append(
            f"  {kind:<18} {c['count']:>6,} x, {count(c['bytes'], 'B')} of arrays, {count(c['sent'], 'B')} sent"
        )
    if not e["collectives"]:
        lines.append("  collectives  none")
    if e["seconds"]:
        each = ", ".join(f"{k} {milliseconds(v)}" for k, v in e["seconds"].items())
        lines.append(f"  time         {each}")
        chip, whole = (count(e[name], "img/s") for name in ("images_per_s_chip", "images_per_s"))
        lines.append(
            f"  bound        {chip} a chip, {whole} in all, MFU {e['mfu']:.0%}, {milliseconds(e['step_seconds'])} a "
            f"call; limited by {e['limit']}"
        )
    return "\n".join(lines)


def largest(found: dict[str, Any], topology: str) -> str:
    tried = f"{found['tried']} compiled"
    if not found["batch"]:
        return f"largest batch: none fits {topology}, not even {found['above']} ({tried}): use more fsdp or remat"
    above = f"; {found['above']:,} does not" if found["above"] else ""
    return f"largest batch: {found['batch']:,} fits {topology}{above} ({tried})"


HEADER = ("data", "fsdp", "tensor", "remat", "memory", "fits", "img/s chip", "MFU", "sent", "limited by")


def row(r: dict[str, Any]) -> tuple[str, ...]:
    """One line of a sweep."""
    e = r["estimate"]
    remat = {None: "-", True: "yes", False: "no"}.get(r["remat"], r["remat"])
    sent = sum(c["sent"] for c in e["collectives"].values())
    known = e["images_per_s"] is not None
    return (
        *(str(r["mesh"][a]) for a in ("data", "fsdp", "tensor")),
        remat,
        size(e["bytes"]),
        "yes" if e["fits"] else "no",
        count(e["images_per_s"] / e["devices"]) if known else "-",
        f"{e['mfu']:.0%}" if known else "-",
        count(sent, "B"),
        e["limit"] or "-",
    )


def table(rows: list[tuple[str, ...]]) -> str:
    cells = [HEADER, *rows]
    widths = [max(len(c[i]) for c in cells) for i in range(len(HEADER))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in cells)


def best(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The fastest row that fits, of those within two per cent the one of least memory; where no time is known, the one
    of least memory. None where nothing fits."""
    fitting = [r for r in rows if r["estimate"]["fits"]]
    if not fitting:
        return None
    fastest = max(r["estimate"]["images_per_s"] or 0.0 for r in fitting)
    near = [r for r in fitting if (r["estimate"]["images_per_s"] or 0.0) >= 0.98 * fastest]
    return min(near, key=lambda r: r["estimate"]["bytes"])


def recommendation(rows: list[dict[str, Any]]) -> str:
    r = best(rows)
    if r is None:
        return "nothing fits: use a smaller batch (--batch), more chips or a chip with more memory"
    fields = [f"--config.mesh.{a}={n}" for a, n in r["mesh"].items()]
    if r["remat"] is not None:
        fields.append(f"--config.model.remat={r['remat']}")
    known = r["estimate"]["images_per_s"] is not None
    why = "the fastest that fits" if known else "least memory, as nothing is known of time"
    return f"recommended ({why}): " + " ".join(fields)
