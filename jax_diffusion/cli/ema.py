"""Make averages of the weights of any width, after training.

examples:
  jax-diffusion train --config=digits --workdir=runs/demo --config.ema.profiles=0.05,0.1 --config.ema.snapshot_every=100
  jax-diffusion ema --workdir=runs/demo --std=0.08
  jax-diffusion ema --workdir=runs/demo --std=0.02,0.05,0.1,0.15,0.2 --step=1500 --plot=profiles.png
  jax-diffusion sample --workdir=runs/demo --ema_std=0.08      (evaluate and the other commands take it too)

The run has to have kept snapshots (ema.profiles). A width is the standard deviation of an average's profile over the
length of training, 0.05 to 0.2 mostly; the best one depends on network, guidance and metric (Karras et al. 2024). The
averages are written to WORKDIR/ema; the error printed is the distance of the profile made from the wanted one, of
which more snapshots leave less.
"""

import argparse
import importlib.util

from jax_diffusion.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--workdir", metavar="DIR", required=True, help="of a training run")
    add("--std", metavar="STD[,STD...]", action="append", required=True, help="relative widths, between 0 and 0.2887")
    add("--step", type=int, metavar="N", help="training step at which the averages end (default: the last snapshot's)")
    add("--plot", metavar="FILE", help="picture of the profiles wanted and made")


def parse_stds(texts: list[str]) -> list[float]:
    """["0.05,0.1", "0.2"] -> [0.05, 0.1, 0.2]."""
    from jax_diffusion.train import posthoc

    stds = []
    for word in ",".join(texts).split(","):
        try:
            std = float(word)
        except ValueError:
            raise UserError(f"--std={','.join(texts)}: {word!r} is no number; write --std=0.05,0.1") from None
        stds.append(posthoc.check_std("--std", std))
    return list(dict.fromkeys(stds))


def run(options: argparse.Namespace) -> None:
    from jax_diffusion.cli import sample
    from jax_diffusion.train import posthoc
    from jax_diffusion.train.workdir import read_meta

    stds = parse_stds(options.std)
    if options.plot:
        sample.check_picture("--plot", options.plot)
        if importlib.util.find_spec("matplotlib") is None:
            raise UserError("plotting needs matplotlib: pip install 'jax_diffusion[plot]'")
    read_meta(options.workdir)  # says where there is no run at all
    found = posthoc.snapshots(options.workdir)
    made = posthoc.reconstruct(
        options.workdir, stds, options.step, sample.progress_line("reading snapshots", len(found))
    )
    for average in made:
        print(f"{average.path}  profile error {100 * average.error:.2g} %")
    if options.plot:
        _plot(options.plot, list(found), made)
        print(options.plot)
    print(f"use: jax-diffusion sample --workdir={options.workdir} --ema_std={stds[0]:g}")


def _plot(path: str, snapshots: list, made: list) -> None:
    """Each wanted profile and, dashed, the weighted sum of the snapshots'."""
    import numpy as np
    from matplotlib.figure import Figure

    from jax_diffusion.train import posthoc

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    end = max(p.step for p in snapshots)
    s = np.linspace(0, end, 1001)[1:]
    for i, average in enumerate(made):
        wanted = average.profile
        sums = sum(x * posthoc.density(p, s) for p, x in average.weights.items())
        axes.plot(s, posthoc.density(wanted, s), f"C{i}", label=f"{wanted.std:g}, error {100 * average.error:.2g} %")
        axes.plot(s, sums, f"C{i}--")
    for step in sorted({p.step for p in snapshots}):
        axes.axvline(step, color="0.9", zorder=0)
    axes.set(xlabel="training step (grey: snapshots)", ylabel="weight in the average", xlim=(0, end))
    axes.legend(title="relative width")
    figure.savefig(path)
