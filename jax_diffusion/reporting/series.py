"""Metrics as series, thinned to a bounded number of points: extremes stay, and so does what is not finite."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

POINTS = 60_000  # of all curves of a page together: about a megabyte
MOST, LEAST = 2000, 40  # of one curve


class Series(NamedTuple):
    """One metric over the steps, ascending."""

    steps: np.ndarray  # int64 [N]
    values: np.ndarray  # float64 [N], NaN and infinities as they came

    @property
    def finite(self) -> np.ndarray:
        return self.values[np.isfinite(self.values)]


def collect(records: Iterable[Mapping[str, Any]]) -> dict[str, Series]:
    """Metric -> its series. Of two values for one step the later one counts; what is no number is left out."""
    found: dict[str, dict[int, float]] = {}
    for record in records:
        for name, value in record.items():
            if name not in ("step", "time") and isinstance(value, int | float):
                found.setdefault(name, {})[record["step"]] = float(value)
    out = {}
    for name, points in found.items():
        steps = np.array(sorted(points), np.int64)
        out[name] = Series(steps, np.array([points[s] for s in steps.tolist()]))
    return out


class Thinned(NamedTuple):
    """What is drawn of a series."""

    points: Series  # at most `limit`: of each stretch the least, the greatest and one that is not finite
    means: Series | None  # of the stretches, to be smoothed; None where nothing was left out


def thin(series: Series, limit: int) -> Thinned:
    """At most `limit` points (8 or more) of a series, among them the first, the last, the least and the greatest."""
    steps, values = series
    if len(steps) <= limit:
        return Thinned(series, None)
    kept, centres, means = {0, len(steps) - 1}, [], []
    for part in np.array_split(np.arange(len(steps)), (limit - 2) // 3):
        inside = values[part]
        finite = np.isfinite(inside)
        if finite.any():
            kept.add(int(part[np.argmin(np.where(finite, inside, np.inf))]))
            kept.add(int(part[np.argmax(np.where(finite, inside, -np.inf))]))
            centres.append(int(np.round(steps[part[finite]].mean())))
            means.append(float(inside[finite].mean()))
        if not finite.all():
            kept.add(int(part[np.argmin(finite)]))
    rows = np.array(sorted(kept))
    return Thinned(Series(steps[rows], values[rows]), Series(np.array(centres, np.int64), np.array(means)))


def number(value: float) -> float | str | None:
    """A value for JSON, which knows neither NaN nor infinity: these as text. Seven digits are kept."""
    if math.isfinite(value):
        short = float(f"{value:.7g}")
        return int(short) if short.is_integer() and abs(short) < 1e15 else short
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def encode(series: Series, limit: int) -> dict[str, Any]:
    """For the page: s steps, v values; and of a thinned series n, how many there were, ms and mv, the means."""
    points, means = thin(series, limit)
    out = {"s": points.steps.tolist(), "v": [number(v) for v in points.values.tolist()]}
    if means is not None:
        out |= {"n": len(series.steps), "ms": means.steps.tolist(), "mv": [number(v) for v in means.values.tolist()]}
    return out
