"""What is due after a dispatch: a function of the steps alone, so that a resumed run does it at the same ones."""

from typing import NamedTuple

from jax_diffusion import config as configs


class Due(NamedTuple):
    """What to do between two dispatches."""

    stops: bool  # this was the last one
    evaluates: bool
    draws: bool
    keeps: bool  # snapshots of the power-function averages
    saves: bool
    pauses: bool  # any of these, or a trace that begins or ends: the host waits for the devices
    logs: bool


def due(every: int, before: int, now: int) -> bool:
    """Whether a multiple of `every` (0: never) lies in (before, now]."""
    return every > 0 and now // every > before // every


def after(config: configs.ConfigDict, before: int, now: int, stops: bool, validates: bool, traces: bool) -> Due:
    """What is due after the steps before + 1 to now.

    stops: the run ends or was asked to end.  validates: there is data for it.  traces: a trace begins or ends.
    """
    t, done = config.train, now == config.train.steps
    evaluates = validates and (due(t.eval_every, before, now) or done)
    draws = due(t.sample_every, before, now) or (t.sample_every > 0 and done)
    keeps = bool(config.ema.profiles) and (due(config.ema.snapshot_every, before, now) or done)
    saves = due(t.checkpoint_every, before, now) or stops
    pauses = evaluates or draws or keeps or saves or traces
    return Due(stops, evaluates, draws, keeps, saves, pauses, due(t.log_every, before, now) or pauses)
