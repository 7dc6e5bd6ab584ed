"""Every network beside its original on the same random weights: the table in docs/from_pytorch.md.

    python docs/scripts/network_parity.py --page=docs/from_pytorch.md

The cases are those of the tests (tests/models/test_parity_*.py, tests/interop), which this runs and prints: the largest
difference of the output, of the gradient of a scalar by the input, and of its gradients by the parameters, each
relative to the largest number of what it is compared with, in float32.
"""

import argparse
import functools
import importlib
import pathlib
import sys
from collections.abc import Callable, Iterator

import numpy as np
import page

TESTS = pathlib.Path(__file__).parents[2] / "tests"
Found = dict[str, float]  # "output", "input" and parameters -> relative difference


def relative(ours, theirs) -> float:
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def of_edm2(test, name: str) -> Found:
    b = test.both(name)
    found = {"output": max(relative(*pair) for pair in zip(b.ours, b.theirs, strict=True))}
    found["input"] = relative(b.ours_by_x, b.theirs_by_x)
    gradients = {k: p.grad.numpy() for k, p in b.net.named_parameters() if p.grad is not None}
    ours = test.weights.save(b.entries, b.by_params)
    return found | {k: relative(ours[k].reshape(g.shape), g) for k, g in gradients.items()}


def of_linear_attention(test, name: str) -> Found:
    theirs, ours, *_ = test.both(name)
    found = {"output": relative(ours[0], theirs[0]), "input": relative(ours[1], theirs[1])}
    return found | {k: relative(ours[2][k], g) for k, g in theirs[2].items() if np.any(g)}


def cases() -> Iterator[tuple[str, str, str, Callable[[], Found]]]:
    """(network, original, case, its differences)."""
    test = importlib.import_module
    unet, unet2d = test("models.test_parity_unet"), test("peers.unet2d")
    adm, edm, ncsnpp = (test(f"{m}") for m in ("interop.test_guided_diffusion", "models.test_parity_edm",
                                               "interop.test_ncsnpp"))  # fmt: skip
    dit, uvit, edm2 = (test(f"models.test_parity_{m}") for m in ("dit", "uvit", "edm2"))
    linear = test("models.test_parity_linear_attention_unet")
    groups = (
        ("`unet`", "diffusers UNet2DModel", unet2d.CONFIGS, unet.differences),
        ("`unet`", "guided-diffusion (azula's copy)", adm.UNETS, adm.differences),
        ("`dit`", "diffusers DiTTransformer2DModel", dit.DIFFUSERS, dit.against_diffusers),
        ("`dit`", "transcription of DiT, SiT", dit.ORIGINAL, dit.against_transcription),
        ("`uvit`", "transcription of U-ViT", uvit.CASES, uvit.both),
        ("`song_unet`, `unet`", "transcription of EDM", edm.CASES, edm.differences),
        ("`song_unet`", "diffusers UNet2DModel, NCSN++ blocks", ncsnpp.CONFIGS, ncsnpp.differences),
        ("`edm2`", "transcription of EDM2, with its Precond", edm2.CASES, functools.partial(of_edm2, edm2)),
        ("`linear_attention_unet`", "denoising_diffusion_pytorch", linear.CASES,
         functools.partial(of_linear_attention, linear)),
    )  # fmt: skip
    for network, original, names, differences in groups:
        for name in names:
            yield network, original, name, functools.partial(differences, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", help="Markdown page to put the table into, between its <!-- networks --> comments")
    args = parser.parse_args()
    sys.path.insert(0, str(TESTS))
    head = ["network", "original", "case", "output", "by the input", "by the parameters (worst)"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for network, original, name, differences in cases():
        found = dict(differences())
        output, by_input = found.pop("output"), found.pop("input")
        worst = f"{max(found.values()):.0e} of {len(found)}"
        label = str(name).replace("_", " ")
        lines.append(f"| {network} | {original} | {label} | {output:.0e} | {by_input:.0e} | {worst} |")
        print(lines[-1], flush=True)
    if args.page:
        page.insert(args.page, "networks", "\n".join(lines))


if __name__ == "__main__":
    main()
