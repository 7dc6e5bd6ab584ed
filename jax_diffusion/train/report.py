"""Rates and progress lines. Metrics are fetched one logging period late, so no step waits for the host."""

import time
from typing import Any, NamedTuple

import jax
import numpy as np


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


class Meter:
    """Collects the step's device metrics and turns each period into a Record, one period late."""

    def __init__(self, total_steps: int, batch_size: int, flops_per_step: float):
        self.total_steps, self.batch_size, self.flops = total_steps, batch_size, flops_per_step
        self._current: list[tuple[int, Any]] = []
        self._pending: tuple[int, list] | None = None
        self._clock = time.perf_counter()

    def add(self, steps: int, metrics: Any) -> None:
        """One dispatch: how many steps it did and its metrics, still on the device."""
        self._current.append((steps, metrics))

    def roll(self, step: int, **extra: float) -> list[Record]:
        """Ends a period at `step` and returns the one before it, which the devices have finished by now."""
        before, self._pending = self._pending, (step, self._current, extra)
        self._current = []
        return [self._finish(*before)] if before else []

    def flush(self, step: int) -> list[Record]:
        """Returns all that is left, waiting for the devices."""
        out = self.roll(step) if self._current else []
        if self._pending:
            out.append(self._finish(*self._pending))
            self._pending = None
        return out

    def restart_clock(self) -> None:
        """Called after work that is not training, so that it does not count in the rates."""
        self._clock = time.perf_counter()

    def _finish(self, step: int, dispatches: list, extra: dict[str, float]) -> Record:
        steps = np.array([n for n, _ in dispatches])
        values = jax.device_get([m for _, m in dispatches])  # waits until the devices are done
        now = time.perf_counter()
        rate, self._clock = steps.sum() / max(now - self._clock, 1e-9), now
        mean = {k: float(np.average([v[k] for v in values], weights=steps)) for k in values[0]}
        scalars = {
            **mean,
            "images_per_s": rate * self.batch_size,
            "flops_per_s": rate * self.flops,
            **extra,
        }
        left = duration((self.total_steps - step) / rate)
        line = (
            f"step {step:>{len(f'{self.total_steps:,}')},}/{self.total_steps:,}  loss {mean['loss']:.4f}  "
            f"{count(scalars['images_per_s'], 'img/s')}  {count(scalars['flops_per_s'], 'FLOP/s')}  ETA {left}"
        )
        return Record(step, scalars, line)
