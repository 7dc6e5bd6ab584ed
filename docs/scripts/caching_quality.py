"""What caching costs in quality beside what it saves, and beside solvers of fewer steps: one plot.

    python docs/scripts/caching_quality.py --workdir=runs/mnist --out=docs/caching_quality --page=docs/caching.md

Draws --num class-conditional samples with and without a cache and measures their Fréchet distance to the real images,
as solver_quality.py does, and how far the samples are from the same solver's without a cache. Cost is counted in whole
evaluations: FLOPs of all evaluations to those of one. Samples are kept in the folder OUT as they come: a second call
goes on where the first was stopped. Writes OUT.png, OUT.json and a Markdown table. --timing measures instead what the
clock says of each cache, the two samplers in turn.
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
from jax_diffusion.caching import Cache

# label: (solver, options)
SOLVERS = {
    "DDIM": ("ddim", {}),
    "DPM-Solver++(2M)": ("dpmpp_2m", {}),
    "UniPC-3": ("unipc", {"order": 3}),
}
# label of the solver: steps without a cache
PLAIN = {"DDIM": (10, 15, 25, 50), "DPM-Solver++(2M)": (5, 7, 10, 15, 25), "UniPC-3": (5, 7, 10, 15, 25)}
# (label of the solver, steps, caches)
CACHED = (
    ("UniPC-3", 10, (Cache(2), Cache(3))),
    ("UniPC-3", 25, (Cache(2), Cache(3), Cache(5))),
    ("DPM-Solver++(2M)", 25, (Cache(2), Cache(3), Cache(5))),
    ("DDIM", 50, (Cache(5), Cache(10), Cache(3), Cache(2), Cache(5, power=1.4, center=0.3), Cache(5, depth=2),
                  Cache(5, depth=3))),
)  # fmt: skip


def plan():
    """(label, steps, cache or None), those without a cache first."""
    yield from ((label, steps, None) for label, several in PLAIN.items() for steps in several)
    yield from ((label, steps, cache) for label, steps, caches in CACHED for cache in caches)


def said(cache: Cache | None) -> str:
    if cache is None:
        return "none"
    return f"every {cache.every}, depth {cache.depth}" + (f", power {cache.power:g}" if cache.power > 1 else "")


def plot(runs: list[dict], path: pathlib.Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    for i, label in enumerate(SOLVERS):
        plain = sorted((r["cost"], r["frechet"]) for r in runs if r["label"] == label and r["cache"] == "none")
        axes.plot(*zip(*plain, strict=True), marker="o", ms=5, lw=1.4, color=f"C{i}", label=f"{label}, no cache")
        for steps in sorted({r["steps"] for r in runs if r["label"] == label and r["cache"] != "none"}):
            for depth, mark in ((1, "^"), (2, "s"), (3, "D")):
                chosen = [r for r in runs if r["label"] == label and r["steps"] == steps and r["depth"] == depth]
                points = sorted((r["cost"], r["frechet"]) for r in chosen)
                if points:
                    axes.plot(*zip(*points, strict=True), marker=mark, ms=6, lw=1, ls=":", color=f"C{i}", mfc="white",
                              label=f"{label}, {steps} steps cached, depth {depth}")  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a sample, in whole evaluations of the network",
             ylabel="Fréchet distance in a classifier's features")  # fmt: skip
    ticks = (4, 5, 7, 10, 15, 25, 50)
    axes.set_xticks(ticks, [str(n) for n in ticks])
    low, high = (f([r["frechet"] for r in runs]) for f in (min, max))
    ticks = [y for y in (3, 3.5, 4, 5, 6, 8, 10, 15, 20, 30, 50, 100) if low * 0.9 < y < high * 1.1]
    axes.set_yticks(ticks, [f"{y:g}" for y in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def table(runs: list[dict]) -> str:
    """Markdown: a row a run, by cost."""
    lines = ["| solver | steps | cache | FLOPs in evaluations | Fréchet distance | from the same without a cache |",
             "|---" * 6 + "|"]  # fmt: skip
    for r in sorted(runs, key=lambda r: r["cost"]):
        apart = "" if r["cache"] == "none" else f"{r['apart']:.3f}"
        lines.append(f"| {r['label']} | {r['steps']} | {r['cache']} | {r['cost']:.1f} | {r['frechet']:.2f} | {apart} |")
    return "\n".join(lines)


def timing(model, num: int, steps: int, repeats: int = 3) -> None:
    """Seconds without and with each cache, in turn; what was predicted of the ratio."""
    # On a CPU its own time: what other processes take of the cores does not count.
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    solver = jd.solvers.make("ddim", model.process.schedule, steps, "trailing")
    labels = list(range(len(model.class_names))) or None

    def seconds(cache):
        started = clock()
        model.sample(jax.random.key(0), solver, num, labels=labels, cache=cache, batch_size=num)
        return clock() - started

    deep = [Cache(3, depth=d) for d in range(2, model.network.depths + 1)]
    for cache in (Cache(2), Cache(3), Cache(6), *deep):
        seconds(None), seconds(cache)  # compiled
        pairs = np.array([(seconds(None), seconds(cache)) for _ in range(repeats)])
        ratios = np.quantile(pairs[:, 0] / pairs[:, 1], (0.25, 0.5, 0.75))
        times = "{:.3f} s without, {:.3f} s with".format(*pairs.min(0))
        spread = f"{ratios[1]:.2f} ({ratios[0]:.2f} to {ratios[2]:.2f})"
        flops = model.predicted_speedup(cache, steps)
        print(f"{said(cache)}: {times}; ratio {spread}, FLOPs {flops:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--out", default="caching_quality", help="without its ending (default: %(default)s)")
    parser.add_argument("--page", help="Markdown page to put the table into, between its <!-- caching --> comments")
    parser.add_argument("--num", type=int, default=400, help="samples each (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=1e9, help="draw no further samples after so long")
    parser.add_argument("--timing", action="store_true", help="only measure times, 24 DDIM steps of 16 samples")
    args = parser.parse_args()
    model = jd.load(args.workdir)
    if args.timing:
        timing(model, 16, 24)
        return
    judge = Judge(model)
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    runs, reference, started = [], {}, time.monotonic()
    for label, steps, cache in plan():
        if cache is not None and cache.depth > model.network.depths:
            continue
        name, options = SOLVERS[label]
        solver = jd.solvers.make(name, model.process.schedule, steps, "trailing", **options)
        kept = out / f"{label} {steps} {said(cache)}.npz".replace(" ", "_")
        if not kept.exists():
            if time.monotonic() - started > 60 * args.minutes:
                continue
            images = model.sample(
                jax.random.key(0), solver, args.num, labels=list(range(len(model.class_names))), cache=cache,
                batch_size=min(200, args.num),
            )  # fmt: skip
            np.savez_compressed(kept, images=np.asarray(jd.data.to_uint8(images)))
        with np.load(kept) as arrays:
            images = np.asarray(jd.data.to_float(arrays["images"]))
        apart = None
        if cache is None:
            reference[label, steps] = images
        elif (label, steps) in reference:
            apart = float(np.sqrt(np.mean((images - reference[label, steps]) ** 2)))
        cost = len(solver) / (1.0 if cache is None else model.predicted_speedup(cache, len(solver)))
        run = {"label": label, "steps": steps, "cache": said(cache), "depth": 0 if cache is None else cache.depth,
               "cost": cost, "frechet": judge.distance(images), "apart": apart}  # fmt: skip
        runs.append(run)
        print(
            f"{label}, {steps}, {said(cache)}: {cost:.1f} evaluations, {run['frechet']:.3f}, apart {apart}", flush=True
        )
    results = {"num": args.num, "real": judge.distance(judge.real_ones(args.num)), "runs": runs}
    out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    plot(runs, out.with_suffix(".png"))
    print(table(runs))
    if args.page:
        page.insert(args.page, "caching", table(runs))


if __name__ == "__main__":
    main()
