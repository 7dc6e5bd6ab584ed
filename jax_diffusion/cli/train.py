"""Train a model, or resume a training run.

examples:
  jax-diffusion train --config=digits --workdir=runs/digits
  jax-diffusion train --config=configs/mnist.py --workdir=runs/mnist --config.data.path=data --config.train.steps=5000
  jax-diffusion train --workdir=runs/mnist                 # resume, bit for bit
  jax-diffusion train --workdir=runs/mnist --config.train.steps=9000     # and go on for longer
  jax-diffusion train --config=digits --workdir=runs/x --stop_at=100

Any field of the config is set as --config.GROUP.FIELD=VALUE (a component with its options:
--config.process.schedule=flow --config.process.schedule.shift=2). Ctrl-C saves and says how to resume.
The workdir holds config.json, metrics.jsonl, tensorboard/, samples/ and checkpoints/.
"""

import argparse

from jax_diffusion.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="RECIPE", help="a recipe's name or file; without it the run is resumed")
    parser.add_argument("--workdir", metavar="DIR", required=True, help="where the run lives")
    parser.add_argument("--stop_at", metavar="STEP", type=int, help="save and stop at this step, as Ctrl-C would")


def run(options: argparse.Namespace) -> None:
    from jax_diffusion import config as configs
    from jax_diffusion.cli import distributed
    from jax_diffusion.model import read_meta
    from jax_diffusion.train.loop import train

    if options.stop_at is not None and options.stop_at < 1:
        raise UserError(f"--stop_at={options.stop_at} must be at least 1")
    config = configs.resolve(options.config) if options.config else None
    if config is None and options.overrides:
        config, _ = read_meta(options.workdir)
    if config is not None:
        config = configs.override(config, options.overrides)
    distributed.join()
    train(config, options.workdir, stop_at=options.stop_at, log=lambda line: print(line, flush=True))
