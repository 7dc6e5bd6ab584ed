"""Which solver comes nearest to many small steps, at equal numbers of evaluations?"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from jax_diffusion import solvers
from jax_diffusion.errors import UserError
from jax_diffusion.schedules import Schedule
from jax_diffusion.solvers.table import Table


class Distance(NamedTuple):
    """From one set of samples to another, in units of the pixels ([-1, 1])."""

    rms: float  # the root of the mean squared difference
    mean: float  # the root mean square of each sample, averaged over samples

    @classmethod
    def of(cls, a: np.ndarray, b: np.ndarray) -> "Distance":
        square = np.square(a.astype(np.float64) - b).reshape(len(a), -1).mean(1)
        return cls(float(np.sqrt(square.mean())), float(np.sqrt(square).mean()))


def published(schedule: Schedule, evaluations: int) -> list[Table]:
    """Every deterministic solver on every grid, of `evaluations` rows or the most that it can have below that.

    Without the grids learned for other people's models (ays_...), and equal tables once. All have the same shape,
    so that they are one compiled program: shorter ones begin with rows that do nothing. A table's name says its
    solver, grid and true number of evaluations.
    """
    found: list[Any] = []
    for name in solvers.SOLVERS:
        for spacing in solvers.grids.SPACINGS:
            table = None if spacing.startswith("ays") else _longest(name, schedule, spacing, evaluations)
            if table is not None and not np.any(table.C) and not any(_same(table, other) for other in found):
                found.append(dataclasses.replace(table, name=f"{name}, {spacing}, {len(table)}"))
    memory = max(t.memory for t in found)
    return [_padded(t.with_memory(memory), evaluations) for t in found]


def _same(a: Table, b: Table) -> bool:
    columns = ((getattr(a, c), getattr(b, c)) for c in ("t", "A", "B", "P"))
    return all(x.shape == y.shape and np.allclose(x, y, rtol=1e-6, atol=1e-6) for x, y in columns)


def _longest(name: str, schedule: Schedule, spacing: str, evaluations: int) -> Table | None:
    for steps in range(evaluations, 0, -1):
        try:
            table = solvers.make(name, schedule, steps, spacing)
        except UserError:  # the grid is not for this schedule, or the solver not for so few steps
            continue
        if not isinstance(table, Table):
            return None
        if len(table) <= evaluations:
            return table
    return None


def _padded(table: Table, rows: int) -> Table:
    """The same solver with rows that change nothing before its own."""
    missing = rows - len(table)
    if not missing:
        return table

    def pad(column, value):
        return np.concatenate([np.full((missing, *column.shape[1:]), value), column])

    values = {"t": table.t[0], "A": 1.0, "B": 0.0, "P": 0.0, "R": 0.0, "C": 0.0, "C_max": 0.0}
    return dataclasses.replace(table, **{k: pad(getattr(table, k), v) for k, v in values.items()})
