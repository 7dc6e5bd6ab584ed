"""jax-diffusion: train, sample and evaluate diffusion models."""

import argparse
import gc
import logging
import os
import sys
import traceback

from jax_diffusion import processes, runtime
from jax_diffusion.cli import distributed
from jax_diffusion.errors import UserError
from jax_diffusion.version import __version__


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def error(self, message: str):
        raise UserError(f"{message} (see {self.prog} --help)")


def _parser() -> Parser:
    from jax_diffusion.cli import (
        bench,
        colorize,
        convert,
        data,
        denoise,
        ema,
        evaluate,
        img2img,
        inpaint,
        interpolate,
        optimize,
        plan,
        report,
        sample,
        studio,
        train,
        upscale,
    )

    parser = Parser(prog="jax-diffusion", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    editing = (inpaint, img2img, upscale, colorize, interpolate, denoise)
    for module in (train, data, report, sample, studio, evaluate, ema, optimize, *editing, convert, plan, bench):
        name = module.__name__.rsplit(".", 1)[1]
        command = commands.add_parser(
            name,
            help=(module.__doc__ or "").splitlines()[0],
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        runtime.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def _run(options: argparse.Namespace) -> int:
    """The command, its compiled programs kept and on CPUs its memory. Returns the exit status."""
    from jax_diffusion import lowering, onednn

    lowering.keep_memory()  # before anything starts JAX's threads
    before = runtime.compiled()
    folder = runtime.keep_compiled(options.compile_cache)
    if options.onednn == "on" and onednn.why_not():
        raise UserError(f"--onednn=on: {onednn.why_not()}")
    with onednn.off(options.onednn == "off"):
        status = options.run(options)
    if options.command != "train" and (runtime.compiled() - before).written:  # training logs it itself
        print(f"compiled programs are kept in {folder} (--compile_cache=DIR or off)", file=sys.stderr)
    return status or 0


def main(arguments: list[str] | None = None) -> int:
    """Runs a command, among several processes perhaps; see _status."""
    if arguments is None:  # the process is the command's own
        # What is imported and traced stays: looking through it after every 700 new objects is a tenth of a short run.
        gc.set_threshold(10_000)
    return distributed.leave(_status(arguments))


def _status(arguments: list[str] | None) -> int:
    """Returns the exit status: 0, 2 for a mistake the user can mend, 75 for a run that was stopped
    and saved by SIGTERM or a preemption notice (start it again), 130 for a second Ctrl-C."""
    logging.basicConfig(level=logging.WARNING, format="warning: %(message)s")
    # Orbax warns of its own routine, and what its threads log of an error is raised as well.
    for name in ("absl", "asyncio", "concurrent.futures"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        options, rest = _parser().parse_known_args(arguments)
        if rest and options.command not in ("train", "data", "convert", "plan", "bench"):
            raise UserError(f"{rest[0]}: unknown argument (see jax-diffusion {options.command} --help)")
        options.overrides = rest
        return _run(options)
    except UserError as e:
        print(f"jax-diffusion: error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("jax-diffusion: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141
    except OSError as e:  # a path that cannot be written, a full disk: the system's own words name it
        print(f"jax-diffusion: error: {e}", file=sys.stderr)
        return 2
    except Exception:
        if not processes.several():
            raise
        traceback.print_exc()  # here, because `leave` does not come back
        return 1


if __name__ == "__main__":
    sys.exit(main())
