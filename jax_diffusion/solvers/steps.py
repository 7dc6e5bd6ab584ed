"""Solvers written as in their papers, turned into tables.

A solver works with `Linear` expressions as if they were arrays: the state, denoised predictions, noise.

    steps = Steps(grid)
    x = steps.x
    for n in range(N):
        D = steps.denoise(x, grid.t[n])             # one network evaluation, one row of the table
        x = a[n] * x + b[n] * D + c[n] * steps.noise()
    return steps.table(x, "my solver")

An expression may use any earlier state. A state x_m that has been left is replaced by what it is in terms of
the next one, x_m = (x_{m+1} - sum_k B_k D_{m-k}) / A_m, so a table remembers predictions alone. Methods that combine
the noise predictions of several steps would so need all D from the first on: they `remember` those instead.
"""

import itertools
import math
from collections.abc import Mapping

import numpy as np

from jax_diffusion.solvers.table import Grid, Table, rows

# What float64 leaves where two terms should have cancelled, relative to them.
CANCELLED = 1e-13
START = -1  # the number of the state before row 0, which may be given noise on its way there


class Linear:
    """A sum of numbers times symbols: row n's state ("x", n), its ("D", n), ("raw", n), ("h", n), and noise ("xi", i).

    `steps` says what states that have been left are in terms of the present one.
    """

    # NumPy's numbers would otherwise try to multiply element by element.
    __array_ufunc__ = None

    def __init__(self, steps: "Steps", terms: Mapping[tuple[str, int], float]):
        self.steps, self.terms = steps, dict(terms)

    def __add__(self, other: "Linear") -> "Linear":
        a, b = self.steps.present(self.terms), self.steps.present(other.terms)
        return Linear(self.steps, _add(a, b))

    def __mul__(self, factor: float) -> "Linear":
        return Linear(self.steps, {k: float(factor) * c for k, c in self.steps.present(self.terms).items()})

    __rmul__ = __mul__

    def __truediv__(self, factor: float) -> "Linear":
        return self * (1 / float(factor))

    def __neg__(self) -> "Linear":
        return self * -1.0

    def __sub__(self, other: "Linear") -> "Linear":
        return self + -other


def _add(a: Mapping, b: Mapping) -> dict[tuple[str, int], float]:
    """The sum, without the terms that cancel but for rounding."""
    total = {k: a.get(k, 0.0) + b.get(k, 0.0) for k in {**a, **b}}
    return {k: c for k, c in total.items() if abs(c) > CANCELLED * (abs(a.get(k, 0.0)) + abs(b.get(k, 0.0)))}


def _replace(terms: Mapping, symbol: tuple[str, int], by: Mapping) -> dict[tuple[str, int], float]:
    """The expression with one symbol said through others."""
    rest = {k: c for k, c in terms.items() if k != symbol}
    return _add(rest, {k: terms.get(symbol, 0.0) * c for k, c in by.items()})


class Steps:
    """Collects the rows of a solver."""

    def __init__(self, grid: Grid):
        self.grid = grid
        self._times: list[float] = []
        self._moves: dict[int, dict] = {}  # n -> x_{n+1} in terms of row n's symbols
        self._kept: dict[int, float] = {}  # n -> P_n, where row n remembers h_n = D_n + P_n x_n
        self._used: dict[int, int] = {}  # noise that is already in a state, and the row that put it there
        self._noises = itertools.count()
        self.x = Linear(self, {("x", START): 1.0})  # the state a solver starts from

    def denoise(self, x: Linear, t: float) -> Linear:
        """D = denoise(x, t): a network evaluation."""
        self._leave(x)
        self._times.append(float(t))
        return Linear(self, {("D", len(self._times) - 1): 1.0})

    def remember(self, D: Linear, P: float) -> Linear:
        """h = D + P x, of the latest evaluation, for later rows to use."""
        ((_, n),) = D.terms
        self._kept[n] = float(P)
        return Linear(self, {("h", n): 1.0})

    def raw(self, D: Linear) -> Linear:
        """The prediction D before clipping; of the latest evaluation alone."""
        ((_, n),) = D.terms
        return Linear(self, {("raw", n): 1.0, ("D", n): 1.0})

    def noise(self) -> Linear:
        """Standard normal noise, independent of all other."""
        return Linear(self, {("xi", next(self._noises)): 1.0})

    def table(self, x: Linear, name: str) -> Table:
        """The table of all rows, the last of which leads to x."""
        self._leave(x)
        n = len(self._times)
        needed = {m for i, move in self._moves.items() for kind, m in move if kind == "h" and m < i}
        for i in self._kept.keys() - needed:
            self._moves[i] = _replace(self._moves[i], ("h", i), {("D", i): 1.0, ("x", i): self._kept[i]})
        ages = [i - m for i, move in self._moves.items() for kind, m in move if kind in ("D", "h")]
        A, P, R, C, B = np.zeros(n), np.zeros(n), np.zeros(n), np.zeros(n), np.zeros((n, 1 + max(ages)))
        for i in range(n):
            for (kind, m), c in self._moves[i].items():
                if kind == "x":
                    A[i] = c
                elif kind in ("D", "h"):
                    B[i, i - m] = c
                elif kind == "raw":
                    R[i] = c
            C[i] = _noise(self._moves[i])
            P[i] = self._kept[i] if i in needed else 0.0
        # A table can add noise to the state it is given, and nothing else.
        assert abs(self._moves[START].get(("x", START), 1.0) - 1) < 1e-9, "the first evaluation rescales the state"
        C_start = _noise(self._moves[START])
        scale = math.hypot(self.grid.prior_scale, C_start)
        return rows(self._times, A, B, C, R, P, scale=scale, name=name, C_start=C_start)

    def present(self, terms: Mapping) -> dict[tuple[str, int], float]:
        """The same expression with every state that has been left said through the present one."""
        for m in [m for kind, m in terms if kind == "D" and m in self._kept]:
            terms = _replace(terms, ("D", m), {("h", m): 1.0, ("x", m): -self._kept[m]})
        n = len(self._times) - 1
        rows = [m if kind == "x" else self._used.get(m, n) for kind, m in terms if kind in ("x", "xi")]
        for m in range(min(rows, default=n), n):
            move = self._moves[m]
            # Whatever went into x_{m+1} alone can be traded for it: x_m, or noise where no x_m went in.
            pivot = ("x", m) if ("x", m) in move else next((k for k in move if k[0] == "xi"), None)
            if c := terms.get(pivot, 0.0):
                factor = c / move[pivot]
                terms = _add(terms, {k: -factor * v for k, v in move.items()})
                terms = _add({k: v for k, v in terms.items() if k != pivot}, {("x", m + 1): factor})
        return dict(terms)

    def _leave(self, x: Linear) -> None:
        """Ends the latest row with the move to x."""
        n = len(self._times) - 1
        terms = self.present(x.terms)
        for kind, m in terms:
            assert kind != "xi" or m not in self._used, "an earlier step's noise is needed again"
            assert kind != "raw" or m == n, "the unclipped prediction is not remembered"
            assert kind != "x" or m == n, "a state that was left with A = 0 is needed again"
        self._used |= {m: n for kind, m in terms if kind == "xi"}
        self._moves[n] = terms


def _noise(move: Mapping) -> float:
    """The standard deviation of all noise in a move."""
    return math.hypot(*(c for (kind, _), c in move.items() if kind == "xi"))
