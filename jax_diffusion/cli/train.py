"""Train a model, or resume a training run.

examples:
  jax-diffusion train --config=digits --workdir=runs/digits
  jax-diffusion train --config=configs/mnist.py --workdir=runs/mnist --config.data.path=data --config.train.steps=5000
  jax-diffusion train --workdir=runs/mnist                 # resume, bit for bit
  jax-diffusion train --workdir=runs/mnist --config.train.steps=9000     # and go on for longer
  jax-diffusion train --config=digits --workdir=runs/x --stop_at=100
  jax-diffusion train --config=digits --workdir=runs/x --profile=50:55     # what the steps 50 to 54 spend their time on
  jax-diffusion train --config=digits --workdir=runs/x --measure_peak --compile_cache=off

Any field of the config is set as --config.GROUP.FIELD=VALUE (a component with its options:
--config.process.schedule=flow --config.process.schedule.shift=2). Ctrl-C saves and says how to resume.
Exit status: 0 finished, or stopped by Ctrl-C or --stop_at and saved; 75 stopped by SIGTERM or a preemption notice and
saved: start the same command again; 2 something to mend, said in one line (docs/faults.md).
The workdir holds config.json, metrics.jsonl, speed.jsonl, tensorboard/, samples/, checkpoints/ and profile/.
A step whose loss or gradient is not finite changes nothing. After train.max_bad_steps of them in a row the run goes
back to a checkpoint and on with other data; after train.max_rollbacks times it ends, with diagnosis-STEP.json.
"mfu" in the log and in speed.jsonl is the model's FLOP/s over the chips' peak; remat is not counted.
"""

import argparse

from jax_diffusion import processes
from jax_diffusion.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="RECIPE", help="a recipe's name or file; without it the run is resumed")
    parser.add_argument("--workdir", metavar="DIR", required=True, help="where the run lives")
    parser.add_argument("--stop_at", metavar="STEP", type=int, help="save and stop at this step, as Ctrl-C would")
    parser.add_argument("--profile", metavar="START:STOP", help="trace these steps into WORKDIR/profile, for "
        "TensorBoard and Perfetto")  # fmt: skip
    parser.add_argument("--measure_peak", action="store_true", help="time matmuls first and give the MFU as a share of "
        "them (default: of the chip's data sheet; on CPUs none is known)")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    from jax_diffusion import config as configs
    from jax_diffusion.cli import distributed
    from jax_diffusion.train import profiling
    from jax_diffusion.train.loop import train
    from jax_diffusion.train.workdir import read_meta

    if options.stop_at is not None and options.stop_at < 1:
        raise UserError(f"--stop_at={options.stop_at} must be at least 1")
    if options.profile is not None:
        profiling.parse(options.profile)
    config = configs.resolve(options.config) if options.config else None
    if config is None and options.overrides:
        config, _ = read_meta(options.workdir)
    if config is not None:
        config = configs.override(config, options.overrides)
    with distributed.joined(options.workdir):
        outcome = train(
            config,
            options.workdir,
            stop_at=options.stop_at,
            profile=options.profile,
            measure_peak=options.measure_peak,
            log=lambda line: print(line, flush=True),
        )
    return processes.RESUME if outcome.stopped_by == "SIGTERM" and not outcome.finished else 0
