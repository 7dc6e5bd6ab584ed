"""Sample from a trained model into a picture.

examples:
  jax-diffusion sample --workdir=runs/demo
  jax-diffusion sample --workdir=runs/mnist --num=64 --labels=3 --guidance=2 --solver=ddim --steps=50 --out=grid.png
  jax-diffusion sample --workdir=runs/mnist --labels=0,1,2 --solver=ddpm --steps=1000 --set variance=fixed_large
  jax-diffusion sample --workdir=runs/mnist --guidance=1,2,4,8 --labels=3 --num=4 --guidance_interval=0.2,5
  jax-diffusion sample --workdir=runs/mnist --guidance=2 --autoguide=runs/mnist:500
  jax-diffusion sample --workdir=runs/mnist --steps=50 --cache=3 --dtype=bfloat16
  jax-diffusion sample --workdir=runs/mnist --table=six.npz     (from jax-diffusion optimize)
  jax-diffusion sample --workdir=runs/mnist --trajectory=film.gif --npz=samples.npz

Image i of a seed is the same whatever --num, --batch_size or the number of devices.
"""

import argparse
import pathlib
import time
from typing import Any

import numpy as np

from jax_diffusion.cli import distributed, guiding, speed
from jax_diffusion.errors import UserError, check_options


class _SolverHelp(str):
    """A help text with the registered solvers' names, looked up when it is shown: importing JAX takes seconds."""

    def __mod__(self, values) -> str:
        from jax_diffusion import solvers

        return super().__mod__({**values, "solvers": ", ".join([*solvers.SOLVERS, *solvers.METHODS])})


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Which weights and which solver: what every command that samples takes."""
    add = parser.add_argument
    add("--workdir", metavar="DIR", required=True, help="of a training run")
    guiding.add_arguments(parser)
    add("--solver", metavar="NAME", help=_SolverHelp("%(solvers)s (default: the recipe's)"))
    add("--steps", type=int, metavar="N", help="solver steps (default: the recipe's)")
    add(
        "--grid",
        metavar="NAME|T,T,...",
        help="leading, trailing, linspace, uniform, quadratic, beta, karras, log_snr, exponential, ays_sd, ays_sdxl, "
        "ays_svd, or the times themselves, decreasing (default: by schedule)",
    )
    add("--set", action="append", default=[], metavar="OPTION=VALUE", help="an option of the solver or its grid: "
        "eta, variance, S_churn, rho, sigma_min, sigma_max, offset, final, grid_unit, ...")  # fmt: skip
    add(
        "--table",
        metavar="FILE",
        help="a solver saved by `jax-diffusion optimize` in place of these four",
    )
    add("--seed", type=int, default=0, metavar="N")
    add("--ema", action=argparse.BooleanOptionalAction, default=True, help="averaged weights, or the raw ones")
    add("--ema_std", type=float, metavar="STD", help="weights averaged over this relative width, made by "
        "`jax-diffusion ema`")  # fmt: skip
    add("--checkpoint", type=int, metavar="STEP", help="default: the newest")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sampling_arguments(parser)
    speed.add_arguments(parser)
    add = parser.add_argument
    add("--num", type=int, metavar="N", help="how many (default: the recipe's)")
    add("--labels", metavar="L[,L...]", help="classes by number or name, repeated in turn; 'none': unconditional "
        "(default: all classes in turn)")  # fmt: skip
    add("--batch_size", type=int, metavar="N", help="samples per call (default: the recipe's)")
    add("--out", metavar="FILE", help="picture of all samples (default: WORKDIR/samples.png)")
    add("--npz", metavar="FILE", help="the samples as arrays: arr_0 uint8 [N, H, W, C], arr_1 the labels")
    add("--trajectory", metavar="FILE", help="GIF film of the denoised prediction at every evaluation")


def parse_labels(text: str | None, class_names: tuple[str, ...]) -> list[int] | None:
    """ "3,roses" -> [3, 2]; None is all classes in turn, "none" is no condition."""
    if text is None:
        return list(range(len(class_names))) or None
    if text == "none":
        return None
    if not class_names:
        raise UserError(f"--labels={text}: this model was trained without labels; leave the option out")
    labels = []
    for word in text.split(","):
        if word in class_names:
            labels.append(class_names.index(word))
        elif word.isdigit() and int(word) < len(class_names):
            labels.append(int(word))
        else:
            known = ", ".join(class_names[:20]) + (", ..." if len(class_names) > 20 else "")
            raise UserError(f"--labels={text}: {word!r} is no class; there are 0 to {len(class_names) - 1}: {known}")
    return labels


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """["eta=0.5"] -> {"eta": 0.5}."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--set {pair}: write it as OPTION=VALUE, for instance --set eta=0.5")
        try:
            options[name] = int(value) if value.lstrip("-").isdigit() else float(value)
        except ValueError:
            words: dict[str, Any] = {"true": True, "false": False}
            options[name] = words.get(value.lower(), value)
    return options


def make_table(model, options: argparse.Namespace, cut=None):
    """The solver the command line asks for, the recipe's where it is silent. cut: Grid -> Grid, to start midway."""
    from jax_diffusion import solvers

    said = model.config.sampling
    asked = options.solver or options.steps is not None or options.grid or options.set
    if options.table is not None:
        return _saved_table(model, options, bool(asked) or cut is not None)
    if not asked and cut is None:
        return model.default_table()
    name = options.solver or said.solver
    steps = options.steps
    if steps is None and not isinstance(solvers.grids.parse(options.grid or ""), list):  # a list has its own number
        steps = said.steps
    chosen = parse_options(options.set)
    if name == "ddpm" and model.process.learn_variance:
        chosen.setdefault("variance", "learned")
    grid = options.grid or said.grid or None
    if cut is not None:
        of_grid = {k: chosen.pop(k) for k in solvers.GRID_OPTIONS if k in chosen}
        check_options("the grid", solvers.grids.make, of_grid, positional=3)
        grid = cut(solvers.grids.make(model.process.schedule, steps, grid, **of_grid))
    return solvers.make(name, model.process.schedule, steps, grid, **chosen)


def _saved_table(model, options: argparse.Namespace, asked: bool):
    from jax_diffusion import solvers

    if asked:
        raise UserError(f"--table={options.table} is a whole solver: leave --solver, --steps, --grid and --set out")
    table, schedule = solvers.load(options.table), model.process.schedule
    if table.t.max() > schedule.t_max or table.t.min() < schedule.t_min:
        raise UserError(
            f"--table={options.table} has times {table.t.min():g} to {table.t.max():g} and this model's are "
            f"{schedule.t_min:g} to {schedule.t_max:g}: it belongs to another model"
        )
    return table


def progress_line(what: str, total: int):
    """`progress(done, total)` for Model.sample: rate and ETA, if it takes over two seconds."""
    from jax_diffusion.progress import Progress

    line, seen = Progress(what, total), 0

    def progress(done: int, _: int) -> None:
        nonlocal seen
        line.add(done - seen)
        seen = done

    return progress


def check_picture(option: str, path: str) -> None:
    """Raises UserError where no picture can be saved under `path`: said before the work, not after it."""
    from PIL import Image

    if pathlib.Path(path).is_dir():
        raise UserError(f"{option}={path} is a folder: name a file in it, for instance {path}/samples.png")
    if pathlib.Path(path).suffix.lower() not in Image.registered_extensions():
        raise UserError(f"{option}={path} has no ending of a picture: use .png, or .gif for a film")


def run(options: argparse.Namespace) -> None:
    for name in ("num", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name}={value} must be at least 1")
    for name in ("out", "trajectory"):
        if getattr(options, name):
            check_picture(f"--{name}", getattr(options, name))
    cache = speed.cache(options)
    with distributed.joined():
        _sample(options, cache)


def _sample(options: argparse.Namespace, cache) -> None:
    import jax

    from jax_diffusion import io, solvers
    from jax_diffusion import model as models

    model = models.load(options.workdir, step=options.checkpoint, ema=options.ema, ema_std=options.ema_std)
    model = speed.cast(options, model)
    said = model.config.sampling
    num = options.num or said.num
    labels = parse_labels(options.labels, model.class_names)
    guidance = guiding.sampling(options, model, labels)
    table = make_table(model, options)
    started = time.perf_counter()
    out = model.sample(
        jax.random.key(options.seed),
        table,
        num,
        labels=labels,
        **guidance,
        cache=cache,
        batch_size=options.batch_size or said.batch_size,
        trajectory=options.trajectory is not None,
        progress=progress_line("sampling", num),
    )
    samples, film = out if options.trajectory else (out, ())
    seconds = time.perf_counter() - started
    if jax.process_index() != 0:
        return
    path = options.out or f"{options.workdir}/samples.png"
    columns = io.class_columns(len(labels)) if labels and num > len(labels) else None
    io.save_grid(path, samples, columns=columns)
    latents = samples.ndim == 4 and samples.shape[-1] > 3
    written = [f"{path} (the first three of {samples.shape[-1]} channels)" if latents else path]
    if options.npz:
        io.save_npz(options.npz, samples, None if labels is None else np.resize(labels, num))
        written.append(options.npz)
    if options.trajectory:
        io.save_film(options.trajectory, film, columns=columns)
        written.append(options.trajectory)
    print(
        f"{num} samples at step {model.step:,} with {table.name}, {solvers.cost(table)}"
        f"{speed.said(cache, model, table)}, in {seconds:.1f} s "
        f"(compilation included): {', '.join(written)}"
    )
