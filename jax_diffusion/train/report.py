"""Rates and progress lines. Metrics are fetched one logging period late, so no step waits for the host."""

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


class Meter:
    """Collects the step's device metrics and turns each period into a Record, one period late."""

    # Dispatches the host may be ahead: enough to keep the devices busy, few enough that its clock is theirs.
    IN_FLIGHT = 2

    def __init__(self, total_steps: int, batch_size: int, flops_per_step: float, peak: float | None = None):
        """flops_per_step: of the model (flops.Work).  peak: FLOP/s of all devices, for the MFU; None is not known."""
        self.total_steps, self.batch_size, self.flops, self.peak = total_steps, batch_size, flops_per_step, peak
        self._current: list[tuple[int, Any]] = []
        self._pending: tuple[int, list, float, dict] | None = None  # step, dispatches, seconds, extra
        self._clock = time.perf_counter()  # when the current period began

    def add(self, steps: int, metrics: Any) -> None:
        """One dispatch: how many steps it did and its metrics, still on the device."""
        self._current.append((steps, metrics))
        if len(self._current) > self.IN_FLIGHT:
            jax.block_until_ready(self._current[-1 - self.IN_FLIGHT][1])

    def roll(self, step: int, extra: dict[str, Any]) -> list[Record]:
        """Ends a period at `step` and returns the one before it. extra: numbers, or arrays still on the device."""
        now = time.perf_counter()
        before, self._pending = self._pending, (step, self._current, now - self._clock, extra)
        self._current, self._clock = [], now
        return [self._finish(*before)] if before else []

    def flush(self, step: int, extra: dict[str, Any]) -> list[Record]:
        """Waits for the devices and returns all that is left, the current period included."""
        jax.block_until_ready([m for _, m in self._current])
        out = self.roll(step, extra) if self._current else []
        if self._pending:
            out.append(self._finish(*self._pending))
            self._pending = None
        return out

    def forget(self) -> None:
        """Drops what was not returned yet: of steps that a rollback has taken back."""
        self._current, self._pending = [], None

    def restart_clock(self) -> None:
        """Called after work that is not training, so that it does not count in the rates."""
        self._clock = time.perf_counter()

    def _finish(self, step: int, dispatches: list, seconds: float, extra: dict) -> Record:
        steps = sum(n for n, _ in dispatches)
        values, extra = jax.device_get(([m for _, m in dispatches], extra))
        period = metrics.summarise([(n, m) for (n, _), m in zip(dispatches, values, strict=True)])
        rate = steps / max(seconds, 1e-9)
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
