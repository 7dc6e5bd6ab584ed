"""Learn a solver of few steps for a trained model.

examples:
  jax-diffusion optimize --workdir=runs/mnist --solver=unipc --steps=6 --out=six.npz
  jax-diffusion optimize --workdir=runs/mnist --steps=6 --guidance=2 --compare --out=six.npz
  jax-diffusion sample --workdir=runs/mnist --guidance=2 --table=six.npz

The solver's coefficients and times are moved by gradient descent until its samples are as near as possible to what
--reference_steps steps make of the same noise. The network stays as it is. The distances printed, in units of pixels
from -1 to 1, are on noises that nothing was learned from. Sample with the guidance that a table was learned with.
"""

import argparse
import pathlib
import time

from jax_diffusion.cli import guiding, sample
from jax_diffusion.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sample.add_sampling_arguments(parser)
    add = parser.add_argument
    add("--labels", metavar="L[,L...]", help="classes to learn from, as for sample (default: all in turn)")
    add("--out", metavar="FILE", help="the table (default: WORKDIR/table.npz)")
    add("--plot", metavar="FILE", help="picture of the table")
    add("--reference", default="dpmpp_3m", metavar="NAME", help="solver of the reference (default: %(default)s)")
    add("--reference_steps", type=int, default=100, metavar="N", help="(default: %(default)s)")
    add("--memory", type=int, metavar="K", help="predictions a row may use (default: the solver's)")
    add("--num", type=int, default=48, metavar="N", help="noises to learn from, and as many to test (default: "
        "%(default)s)")  # fmt: skip
    add("--batch_size", type=int, default=8, metavar="N", help="noises per iteration (default: %(default)s)")
    add("--iterations", type=int, default=200, metavar="N", help="(default: %(default)s)")
    add("--learning_rate", type=float, default=0.02, metavar="R", help="(default: %(default)s)")
    add("--compare", action="store_true", help="first rank all published solvers at as many evaluations; without "
        "--solver, --grid and --table, begin with the best")  # fmt: skip


def run(options: argparse.Namespace) -> None:
    import jax
    import numpy as np

    from jax_diffusion import model as models
    from jax_diffusion import solvers
    from jax_diffusion.solvers import compare, noise
    from jax_diffusion.solvers.learned import deterministic, endpoints, optimize

    for name in ("num", "batch_size", "iterations", "reference_steps", "memory"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name}={value} must be at least 1")
    out = pathlib.Path(options.out or f"{options.workdir}/table.npz")
    if out.suffix != ".npz":
        raise UserError(f"--out={out} holds arrays: give it the ending .npz")
    if options.plot:
        sample.check_picture("--plot", options.plot)
    model = models.load(options.workdir, step=options.checkpoint, ema=options.ema, ema_std=options.ema_std)
    if model.condition is not None:
        raise UserError(f"--workdir={options.workdir} is conditioned on an image: use solvers.optimize from Python")
    labels = sample.parse_labels(options.labels, model.class_names)
    guidance = guiding.sampling(options, model, labels)
    table = deterministic(sample.make_table(model, options))
    if options.memory is not None and options.memory < table.used_memory:
        raise UserError(f"--memory={options.memory}: {table.name} uses {table.used_memory} predictions already")
    schedule, n, total = model.process.schedule, options.num, 2 * options.num
    # The second half is held out.
    keys = noise.sample_keys(jax.random.key(options.seed), jax.numpy.arange(total))
    x = np.asarray(noise.normal(keys, 0, model.shape))
    per_sample = {"labels": None if labels is None else np.resize(labels, total), **guidance}
    given = model.denoiser(total, **per_sample)
    denoiser, params, cond = (given[k] for k in ("denoiser", "params", "cond"))

    reference = deterministic(solvers.make(options.reference, schedule, options.reference_steps))

    def ends(table, rows, what=None):
        some = jax.tree.map(lambda a: a[rows], cond)
        options = {"progress": sample.progress_line(what, rows.stop - rows.start)} if what else {}
        start = float(table.scale) * x[rows]
        return endpoints(table, denoiser, start, params=params, cond=some, batch_size=min(32, n), **options)

    train, held_out = slice(0, n), slice(n, total)
    target = ends(reference, slice(0, total), f"{options.reference_steps}-step reference")
    lines = []

    def judge(name, table):
        distance = compare.Distance.of(ends(table, held_out), target[held_out])
        lines.append((distance, name))
        print(f"{distance.rms:>8.4f} {distance.mean:>8.4f}  {name}", flush=True)

    print(f"distance to {reference.name} with {len(reference)} evaluations, on {n} held-out noises")
    print(f"{'RMS':>8} {'mean':>8}  solver, grid, evaluations")
    if options.compare:
        best = _best(schedule, len(table), ends, target, n)
        for candidate in best[:8]:
            judge(candidate.name, candidate)
        if not (options.solver or options.grid or options.table):
            table = min(zip((d for d, _ in lines), best, strict=False), key=lambda pair: pair[0])[1]
    else:
        judge(f"{table.name}, {len(table)}", table)
    # Only the predictions that the solver uses are weighted, unless more are asked for.
    table = table.with_memory(options.memory or table.used_memory)
    line = sample.progress_line("optimizing", options.iterations)
    began = time.perf_counter()
    learned = optimize(
        table,
        denoiser,
        float(table.scale) * x[train],
        target[train],
        schedule,
        params=params,
        cond=jax.tree.map(lambda a: a[train], cond),
        iterations=options.iterations,
        learning_rate=options.learning_rate,
        batch_size=options.batch_size,
        seed=options.seed,
        progress=lambda done, loss: line(done, options.iterations),
    )
    seconds = time.perf_counter() - began
    judge(learned.name, learned)
    learned.save(out)
    written = [str(out)]
    if options.plot:
        learned.plot().savefig(options.plot)
        written.append(options.plot)
    print(f"{options.iterations} iterations in {seconds:.0f} s (compilation included): {', '.join(written)}")


def _best(schedule, evaluations: int, ends, target, n: int) -> list:
    """All published solvers, the nearest to the reference on a few of the noises to learn from first."""
    import numpy as np

    from jax_diffusion.solvers import compare

    few = slice(0, min(16, n))
    candidates = compare.published(schedule, evaluations)
    line = sample.progress_line("comparing solvers", len(candidates))
    scores = []
    for i, candidate in enumerate(candidates):
        scores.append(compare.Distance.of(ends(candidate, few), target[few]).rms)
        line(i + 1, len(candidates))
    return [candidates[i] for i in np.argsort(scores)]
