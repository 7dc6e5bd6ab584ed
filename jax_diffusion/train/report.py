"""Rates and progress lines. Metrics are fetched one logging period late, so no step waits for the host."""

import collections
import dataclasses
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_diffusion.train import metrics


def count(n: float, unit: str = "") -> str:
    """1234567 -> "1.23 M": three digits and a prefix."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= factor:
            return f"{n / factor:.3g} {prefix}{unit}"
    return f"{n:.3g} {unit}".rstrip()


def duration(seconds: float) -> str:
    """3723 -> "1:02:03"."""
    s = round(seconds)
    return f"{s // 3600}:{s % 3600 // 60:02d}:{s % 60:02d}" if s >= 3600 else f"{s // 60}:{s % 60:02d}"


class Record(NamedTuple):
    """One logging period, as floats."""

    step: int
    scalars: dict[str, float]
    line: str
    in_a_row: np.ndarray  # [steps], of each step of the period: how many were skipped in a row up to it


@dataclasses.dataclass
class _Dispatch:
    """Some steps in one program."""

    steps: int
    metrics: Any  # of it, on the device
    done: float | None = None  # when the host found it done
    late: bool = False  # the host came after that

    def wait(self) -> float:
        if self.done is None:
            self.late = all(getattr(x, "is_ready", bool)() for x in jax.tree.leaves(self.metrics))
            jax.block_until_ready(self.metrics)
            self.done = time.perf_counter()
        return self.done


class Meter:
    """Collects the step's device metrics and turns each period into a Record, one period late.

    Rates are of the time at which the devices were done, not of that at which the host had asked.
    """

    # Dispatches the host may be ahead: enough to keep the devices busy, few enough that it hears when they are done.
    IN_FLIGHT = 2

    def __init__(self, total_steps: int, batch_size: int, flops_per_step: float, peak: float | None = None):
        """flops_per_step: of the model (flops.Work).  peak: FLOP/s of all devices, for the MFU; None is not known."""
        self.total_steps, self.batch_size, self.flops, self.peak = total_steps, batch_size, flops_per_step, peak
        self._current: list[_Dispatch] = []
        self._pending: tuple[int, list[_Dispatch], dict] | None = None  # step, dispatches, extra
        self._flying: collections.deque[_Dispatch] = collections.deque()
        self._clock: float  # when the devices began the period that is finished next
        self._before: tuple[float, int] | None  # when they began the one before it, and its steps
        self.restart_clock()

    def add(self, steps: int, metrics: Any) -> None:
        """One dispatch: how many steps it did and its metrics, still on the device."""
        dispatch = _Dispatch(steps, metrics)
        self._current.append(dispatch)
        self._flying.append(dispatch)
        if len(self._flying) > self.IN_FLIGHT:
            self._flying.popleft().wait()

    def roll(self, step: int, extra: dict[str, Any]) -> list[Record]:
        """Ends a period at `step` and returns the one before it. extra: numbers, or arrays still on the device."""
        before, self._pending = self._pending, (step, self._current, extra)
        self._current = []
        return [self._finish(*before)] if before else []

    def flush(self, step: int, extra: dict[str, Any]) -> list[Record]:
        """Waits for the devices and returns all that is left, the current period included."""
        while self._flying:
            self._flying.popleft().wait()
        out = self.roll(step, extra) if self._current else []
        if self._pending:
            out.append(self._finish(*self._pending))
            self._pending = None
        return out

    def forget(self) -> None:
        """Drops what was not returned yet: of steps that a rollback has taken back."""
        self._current, self._pending = [], None
        self._flying.clear()
        self.restart_clock()

    def restart_clock(self) -> None:
        """Called after work that is not training, so that it does not count in the rates."""
        self._clock, self._before = time.perf_counter(), None

    def _finish(self, step: int, dispatches: list[_Dispatch], extra: dict) -> Record:
        values, extra = jax.device_get(([d.metrics for d in dispatches], extra))
        began, self._clock = self._clock, dispatches[-1].wait()  # no more than a look at the clock
        steps = sum(d.steps for d in dispatches)
        rate = steps / max(self._clock - began, 1e-9)
        if dispatches[-1].late and self._before:
            # A host that was busy finds two periods done at once: how long the second took nobody has seen.
            rate = (self._before[1] + steps) / max(self._clock - self._before[0], 1e-9)
        self._before = began, steps
        period = metrics.summarise([(d.steps, m) for d, m in zip(dispatches, values, strict=True)])
        scalars = {
            **period.scalars,
            "images_per_s": rate * self.batch_size,
            "flops_per_s": rate * self.flops,
            **({"mfu": rate * self.flops / self.peak} if self.peak else {}),
            **{k: float(v) for k, v in extra.items() if np.isfinite(v)},  # JSON has no infinity
        }
        used = f"  MFU {scalars['mfu']:.1%}" if self.peak else ""
        left = duration((self.total_steps - step) / rate)
        loss = f"loss {scalars['loss']:.4f}" if "loss" in scalars else "all skipped"
        line = (
            f"step {step:>{len(f'{self.total_steps:,}')},}/{self.total_steps:,}  {loss}  "
            f"{count(scalars['images_per_s'], 'img/s')}  {count(scalars['flops_per_s'], 'FLOP/s')}{used}  ETA {left}"
        )
        return Record(step, scalars, line, period.in_a_row)
