"""A run watched from inside: does memory grow, or the number of threads, files or arrays on the devices?

    python tests/train/soak_script.py --minutes=30 --out=soak            # soak.png, soak.json and the verdict

Trains a small network on the digits with checkpoints, validation and samples far more often than any user would ask
for, takes a reading every few seconds, and exits with 1 where something grew. test_soak.py runs it for seconds.
"""

import argparse
import json
import os
import pathlib
import signal
import sys
import tempfile
import time
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from jax_diffusion import config as configs
from jax_diffusion.train import loop, stored

# Share of itself that the resident set may grow by over the second half, by the fitted line: it saws up and down by as
# much as garbage is collected. One state kept for each checkpoint would be several times this in 30 minutes.
BOUND = 0.05
# MiB that tensorstore (0.1.76 to 0.1.86) loses for every array of every checkpoint: what KvStore.Spec.to_json makes,
# and its metrics, which orbax asks for, is never freed. It is let grow by that much more.
LOST = 2 / 1024
FIELDS = (
    "model.channels=16", "model.heads=2", "train.batch_size=32", "train.steps=100000000", "train.log_every=10",
    "train.eval_every=50", "train.eval_batches=2", "train.sample_every=50", "train.checkpoint_every=50",
    "optim.schedule=constant", "sampling.steps=4", "sampling.num=20", "sampling.batch_size=20",
)  # fmt: skip


class Reading(NamedTuple):
    """One look at this process."""

    seconds: float  # since the start
    step: int
    rss: float  # MiB resident
    threads: int
    files: int  # open file descriptors
    arrays: int  # alive on the devices
    array_mib: float

    @classmethod
    def take(cls, started: float, step: int) -> "Reading":
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        alive = jax.live_arrays()
        return cls(
            time.monotonic() - started,
            step,
            pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
            len(os.listdir("/proc/self/task")),
            len(os.listdir("/proc/self/fd")),
            len(alive),
            sum(a.nbytes for a in alive) / 2**20,
        )


def watch(config, workdir, *, every: float = 3.0, seconds: float = float("inf"), report=lambda line: None):
    """Trains and returns the Readings, taken after a line of the log, `every` seconds apart at least.

    seconds: then it is stopped, by a Ctrl-C as a user would.
    """
    readings, started, asked = [], time.monotonic(), []

    def log(line: str) -> None:
        report(line)
        if not line.startswith("step"):
            return
        now = time.monotonic() - started
        if not readings or now - readings[-1].seconds >= every:
            step = int(line.split("/")[0].split(":")[0].removeprefix("step").replace(",", ""))
            readings.append(Reading.take(started, step))
        if now >= seconds and not asked:  # a second one would break off
            asked.append(now)
            os.kill(os.getpid(), signal.SIGINT)

    loop.train(config, workdir, log=log)
    return readings


def slope(x: np.ndarray, y: np.ndarray) -> float:
    """Of the line through the points, by the median of all pairs' slopes (Theil & Sen): peaks do not bend it."""
    i, j = np.triu_indices(len(x), 1)
    return float(np.median((y[j] - y[i]) / (x[j] - x[i])))


def verdict(readings: list[Reading], saved: float = 0.0) -> tuple[bool, list[str]]:
    """Whether nothing grew, and a line for each thing looked at. saved: arrays in checkpoints, for each step."""
    columns = {name: np.array([getattr(r, name) for r in readings], float) for name in Reading._fields}
    half, quarter = len(readings) // 2, len(readings) // 4
    t, steps = columns["seconds"][half:], columns["step"][half:]
    rate = slope(t, columns["rss"][half:])
    lost = LOST * saved * (steps[-1] - steps[0])
    grown, bound = rate * (t[-1] - t[0]), BOUND * columns["rss"][half:].mean() + lost
    lines = [
        f"RSS {columns['rss'][half:].mean():.1f} MiB in the second half, {rate * 3600:+.2f} MiB/hour: "
        f"{grown:+.2f} MiB over its {t[-1] - t[0]:.0f} s (bound {bound:.1f}, of which tensorstore's {lost:.1f})"
    ]
    good = grown < bound
    for name in ("threads", "files", "arrays"):
        before, after = columns[name][quarter : 2 * quarter], columns[name][-quarter:]
        # The most is by chance: whether a checkpoint was being written. So is one of the least.
        same = after.min() <= before.min() + 1
        good &= bool(same)
        lines.append(
            f"{name}: {before.min():.0f} to {before.max():.0f} in the second quarter, {after.min():.0f} to "
            f"{after.max():.0f} in the last: {'no more' if same else 'MORE'}"
        )
    return good, lines


def plot(readings: list[Reading], path: pathlib.Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = {"rss": "resident, MiB", "threads": "threads", "files": "open files", "arrays": "arrays on the devices"}
    figure, axes = plt.subplots(len(names), 1, figsize=(8, 8), sharex=True, layout="constrained")
    minutes = [r.seconds / 60 for r in readings]
    for axis, (name, what) in zip(axes, names.items(), strict=True):
        axis.plot(minutes, [getattr(r, name) for r in readings], linewidth=1)
        axis.set_ylabel(what)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].set_title(title, fontsize=9)
    axes[-1].set_xlabel("minutes")
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--every", type=float, default=3, help="seconds between readings (default: %(default)s)")
    parser.add_argument("--out", default="soak", help="writes OUT.png and OUT.json (default: %(default)s)")
    parser.add_argument("--workdir", help="default: a temporary folder, removed at the end")
    options, fields = parser.parse_known_args()
    config = configs.override(configs.resolve("digits"), [*(f"--config.{f}" for f in FIELDS), *fields])
    with tempfile.TemporaryDirectory() as scratch:
        readings = watch(
            config,
            options.workdir or scratch,
            every=options.every,
            seconds=60 * options.minutes,
            report=lambda line: print(line, flush=True),
        )
        folder = pathlib.Path(options.workdir or scratch, "checkpoints")
        leaves = stored.read_meta(folder, stored.steps(folder)[-1])["leaves"]
    arrays = sum(map(len, leaves.values()))
    good, lines = verdict(readings, saved=arrays / config.train.checkpoint_every)
    title = f"{readings[-1].step:,} steps, {readings[-1].step // 50:,} checkpoints, validations and grids of samples"
    plot(readings, pathlib.Path(f"{options.out}.png"), title)
    pathlib.Path(f"{options.out}.json").write_text(json.dumps([r._asdict() for r in readings]) + "\n")
    print("\n".join([title, *lines, "flat" if good else "SOMETHING GREW"]))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
