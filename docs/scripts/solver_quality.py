"""Evaluations to quality: every solver on a trained model, one plot.

    python docs/scripts/solver_quality.py --workdir=runs/mnist --out=docs/solver_quality --page=docs/solvers.md

Draws --num class-conditional samples with each solver at each number of network evaluations and measures their
Fréchet distance to the real images in the features of a classifier trained on those (evals/classifier.py).
Samples are kept in the folder OUT as they come: a second call goes on where the first was stopped. Writes OUT.png,
OUT.json and a Markdown table.
"""

import argparse
import json
import pathlib
import time

import jax
import numpy as np
import page
from judge import Judge

import jax_diffusion as jd

# A cosine schedule begins at sigma / alpha = 20,000, from where methods that combine noise predictions explode in
# so few steps (in diffusers too); they, and Runge-Kutta, begin where EDM does.
FROM_80 = {"sigma_max": 80.0, "sigma_min": 0.01}
# label: (solver, grid, options, evaluations a step)
SOLVERS = {
    "DDIM": ("ddim", "trailing", {}, 1),
    "Euler ancestral": ("euler_ancestral", "trailing", {}, 1),  # which on these points is DDPM
    "PLMS": ("plms", "karras", FROM_80, 1),
    "LMS": ("lms", "karras", FROM_80, 1),
    "DEIS-3": ("deis", "karras", FROM_80, 1),
    "Heun": ("heun", "karras", FROM_80, 2),
    "DPM-Solver++(2M)": ("dpmpp_2m", "trailing", {}, 1),
    "DPM-Solver++(3M)": ("dpmpp_3m", "trailing", {}, 1),
    "SDE-DPM-Solver++(2M)": ("sde_dpmpp_2m", "trailing", {}, 1),
    "UniPC-3": ("unipc", "trailing", {"order": 3}, 1),
}
EVALUATIONS = (5, 7, 10, 15, 25)


def plan():
    """(label, solver, grid, options, steps), the cheap ones of every solver first."""
    for n in EVALUATIONS:
        for label, (solver, grid, options, cost) in SOLVERS.items():
            if cost == 1 or n % 2:  # Heun's number is odd
                steps = n if cost == 1 else (n + 1) // 2
                yield label, solver, grid, options, steps - (solver == "plms")  # its start evaluates once more
    yield "DDPM", "ddpm", "trailing", {}, 1000


def plot(results: dict, path: pathlib.Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.2), layout="constrained")
    axes = figure.subplots()
    for i, label in enumerate(SOLVERS):
        points = sorted((r["evaluations"], r["frechet"]) for r in results["runs"].values() if r["label"] == label)
        points = [p for p in points if p[0] <= max(EVALUATIONS)]
        if points:
            axes.plot(*zip(*points, strict=True), marker="os^vD"[i % 5], ms=4, lw=1.3, color=f"C{i % 10}",
                      ls="-" if i < 10 else "--", label=label)  # fmt: skip
    for key, style, text in (("ddpm1000", "-", "DDPM, 1000 evaluations"), ("real", ":", "real images")):
        if key in results:
            axes.axhline(results[key], color="black", ls=style, lw=1, label=f"{text}: {results[key]:.2f}")
    axes.set(xscale="log", yscale="log", ylim=(None, 12), xlabel="network evaluations a sample",
             ylabel="Fréchet distance in a classifier's features")  # fmt: skip
    axes.set_xticks(EVALUATIONS, [str(n) for n in EVALUATIONS])
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=110)


def table(results: dict) -> str:
    """Markdown: a row a solver, a column a number of evaluations."""
    lines = ["| solver | " + " | ".join(map(str, EVALUATIONS)) + " |", "|---" * (len(EVALUATIONS) + 1) + "|"]
    for label in SOLVERS:
        cells = {r["evaluations"]: r["frechet"] for r in results["runs"].values() if r["label"] == label}
        lines.append(f"| {label} | " + " | ".join(f"{cells[n]:.2f}" if n in cells else "" for n in EVALUATIONS) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--out", default="solver_quality", help="without its ending (default: %(default)s)")
    parser.add_argument("--page", help="Markdown page to put the table into, between its <!-- quality --> comments")
    parser.add_argument("--num", type=int, default=400, help="samples each (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no further solver after so long")
    args = parser.parse_args()
    out = pathlib.Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    model = jd.load(args.workdir)
    judge = Judge(model)
    classes = len(model.class_names)
    asked = np.resize(np.arange(classes), args.num)
    results = {"num": args.num, "classifier_accuracy": judge.accuracy(judge.held_out["image"], judge.held_out["label"]),
               "real": judge.distance(judge.real_ones(args.num)), "runs": {}}  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    for label, solver, grid, options, steps in plan():
        kept = out / f"{label.replace(' ', '_')}_{steps}.npz"
        if not kept.exists():
            if time.monotonic() - started > 60 * args.minutes:
                continue
            solver_table = jd.solvers.make(solver, model.process.schedule, steps, grid, **options)
            solver_table = solver_table.with_memory(5)  # one program a number of rows
            images = model.sample(
                jax.random.key(0), solver_table, args.num, labels=list(range(classes)), batch_size=min(200, args.num)
            )
            np.savez_compressed(kept, images=np.asarray(jd.data.to_uint8(images)), evaluations=len(solver_table))
        with np.load(kept) as arrays:
            images, evaluations = np.asarray(jd.data.to_float(arrays["images"])), int(arrays["evaluations"])
        run = {"label": label, "evaluations": evaluations, "frechet": judge.distance(images),
               "accuracy": judge.accuracy(images, asked)}  # fmt: skip
        results["runs"][f"{label} {steps}"] = run
        if steps == 1000:
            results["ddpm1000"] = run["frechet"]
        print(f"{label}, {evaluations}: {run['frechet']:.3f}, accuracy {run['accuracy']:.1%}", flush=True)
    out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    plot(results, out.with_suffix(".png"))
    print(table(results))
    if args.page:
        page.insert(args.page, "quality", table(results))


if __name__ == "__main__":
    main()
