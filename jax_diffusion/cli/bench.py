"""Train and sample the same network in JAX and in PyTorch, in turn, on this machine.

examples:
  jax-diffusion bench --quick
  jax-diffusion bench --cases=unet_half,dit_s2 --out=bench.json --plot=bench.png
  jax-diffusion bench --cases=unet --mode=sample --batch=1,16,64,256 --plot=sampling.png
  jax-diffusion bench --cases=dit_xl2 --mode=train --batch=32 --dtype=bfloat16
  jax-diffusion bench --cases=unet --only=jax                       (PyTorch is not needed)
  jax-diffusion bench --cases=unet_half --config.model.channels=32  (any field of the recipe)
  jax-diffusion bench --cases=unet_half --starts                    (the compile cache)

Each framework has a process of its own with the same weights; their outputs are compared before anything is timed.
They take turns, round by round; compiling is not in the times. `jax is` says how many times as fast JAX is: beside
each variant of PyTorch, and in JAX's own rows beside the best of these, marked *.
"""

import argparse
import importlib.util
import pathlib
import tempfile

from jax_diffusion.bench import cases
from jax_diffusion.errors import UserError, choose

DTYPES = ("float32", "bfloat16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--cases", metavar="NAME,...", help="; ".join(f"{name}: {case.about}" for name, case in cases.CASES.items())
        + " (default: unet_half on CPUs, else what fits)")  # fmt: skip
    add("--mode", metavar="MODE,...", help="train, forward, sample (default: all)")
    add("--batch", metavar="N,...", help="images at a time (default: by case and device)")
    add("--dtype", metavar="TYPE", help="of matmuls and convolutions: float32, bfloat16 (default: float32 on CPUs)")
    add("--rounds", type=int, metavar="N", help="how often each runs (default: 5)")
    add("--steps", type=int, metavar="N", help="steps of a round (default: 50, fewer where they take long)")
    add("--sampler_steps", type=int, default=50, metavar="N", help="of DDIM (default: %(default)s)")
    add("--threads", type=int, metavar="N", help="cores for each framework on CPUs (default: all)")
    add("--variants", metavar="NAME,...", help="of PyTorch: eager, eager_channels_last, compile, pipeline, loop, ... "
        "(default: all that run here)")  # fmt: skip
    add("--only", choices=("jax",), help="leave PyTorch out")
    add("--quick", action="store_true", help="a small batch, few steps, no torch.compile: three minutes on two cores")
    add(
        "--xla_flags", metavar="FLAGS", help="time JAX a second time, with these flags for XLA beside the environment's"
    )
    add("--starts", action="store_true", help="time two starts of JAX instead, with an empty and a full compile cache")
    add("--out", metavar="FILE", help="everything as JSON: machine, versions, settings, every round")
    add("--plot", metavar="FILE", help="bars, and images a second against the batch")


def _numbers(option: str, text: str | None) -> tuple[int, ...]:
    words = text.split(",") if text else []
    if not all(word.isdigit() and int(word) > 0 for word in words):
        raise UserError(f"{option}={text}: give positive numbers, for instance {option}=1,16,64")
    return tuple(map(int, words))


def _names(option: str, text: str | None, known) -> tuple[str, ...]:
    return tuple(choose(option, word, known) for word in text.split(",")) if text else ()


def _check(options: argparse.Namespace, names: tuple[str, ...]) -> None:
    for field in ("rounds", "steps", "sampler_steps", "threads"):
        value = getattr(options, field)
        if value is not None and value < 1:
            raise UserError(f"--{field}={value} must be at least 1")
    if options.dtype:
        choose("--dtype", options.dtype, DTYPES)
    for name in ("out", "plot"):
        path = getattr(options, name)
        if path and (pathlib.Path(path).is_dir() or not pathlib.Path(path).parent.is_dir()):
            raise UserError(f"--{name}={path}: name a file in a folder that exists")
    if options.plot:
        from jax_diffusion.cli.sample import check_picture

        check_picture("--plot", options.plot)
        if importlib.util.find_spec("matplotlib") is None:
            raise UserError("--plot needs matplotlib: pip install matplotlib")
    if options.only or options.starts:
        return
    wanted = {"torch": "--only=jax times JAX alone"}
    for name in names:
        wanted |= dict.fromkeys(cases.CASES[name].needs, f"the case {name} needs it")
    for package, why in wanted.items():
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{package} is not installed ({why}): pip install {package}, or use --only=jax")


def run(options: argparse.Namespace) -> None:
    from jax_diffusion.bench import report, run, settings, variants

    names = _names("--cases", options.cases, cases.CASES)
    modes = _names("--mode", options.mode, cases.MODES) or cases.MODES
    known = {name for mode in variants.VARIANTS.values() for name in mode}
    chosen = _names("--variants", options.variants, known)
    batches = _numbers("--batch", options.batch)
    _check(options, names or ("unet_half",))
    short = options.quick and options.sampler_steps == 50
    asked = settings.Options(
        cases=names, modes=modes, batches=batches, dtype=options.dtype or "", rounds=options.rounds or 0,
        steps=options.steps or 0, sampler_steps=10 if short else options.sampler_steps,
        threads=options.threads or 0, only=options.only or "", variants=chosen, xla_flags=options.xla_flags or "",
        quick=options.quick, overrides=tuple(options.overrides),
        compile_cache=options.compile_cache or "off",
        onednn=options.onednn != "off",
    )  # fmt: skip
    say = lambda line: print(line, flush=True)  # noqa: E731
    if options.starts:
        _starts(asked, say, options.out)
        return
    save = (lambda result: report.write(options.out, result)) if options.out else (lambda result: None)
    with tempfile.TemporaryDirectory(prefix="jax_diffusion_bench_") as folder:
        bench = run.Bench(asked, pathlib.Path(folder), say, save)
        try:
            bench.run()
        finally:
            if bench.result["rows"]:
                say("\n" + report.table(bench.result))
                if options.plot:
                    from jax_diffusion.bench import plot

                    plot.draw(options.plot, bench.result)
                written = [path for path in (options.out, options.plot) if path]
                if written:
                    say(f"\nwritten: {', '.join(written)}")
    if bench.result["failures"]:
        raise UserError("; ".join(bench.result["failures"]))


def _starts(asked, say, out: str | None) -> None:
    from jax_diffusion.bench import machine, report, starts

    names, batch = asked.cases or ("unet_half",), (asked.batches or (16,))[0]
    threads = asked.threads or machine.cores()
    found = starts.measure(names, batch, asked.dtype, asked.sampler_steps, asked.overrides, threads, say)
    say("\n" + starts.table(found))
    if out:
        report.write(out, {"machine": machine.describe(), "settings": asked._asdict(), "starts": found})
        say(f"\nwritten: {out}")
