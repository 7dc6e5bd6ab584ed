"""Exponential integrators in l = log(alpha / sigma): what DPM-Solver, DPM-Solver++, DEIS and UniPC share.

Over a step h = l_b - l_a, with v in [0, 1] the way through it, the probability-flow ODE is solved exactly by

    x_b = sigma_b / sigma_a x_a + alpha_b int D(v)   z e^{-z(1-v)} dv,   z = h     data prediction
    x_b = alpha_b / alpha_a x_a + sigma_b int eps(v) z e^{-z(1-v)} dv,   z = -h    noise prediction

(Lu et al. 2022b, proposition 4.1; Lu et al. 2022a, proposition 3.1). A method is the polynomial in v that it puts in
place of the prediction, and for a polynomial the integrals are exact:

    x_b = ratio x_a + scale sum_j c_j I_j(z),    I_j(z) = int v^j z e^{-z(1-v)} dv,    prediction ~ sum_j c_j v^j

The papers' shorter formulae replace some I_j by something that agrees with it to the order that is needed.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jax_diffusion.errors import UserError
from jax_diffusion.solvers.steps import Linear, Steps
from jax_diffusion.solvers.table import Grid, Table


class Point(NamedTuple):
    """A point of the path. t is None where a grid lands: nothing is evaluated there."""

    t: Any  # float
    alpha: float
    sigma: float
    l: float  # log(alpha / sigma): -inf at alpha = 0, where a flow begins; inf at sigma = 0


def points(grid: Grid) -> list[Point]:
    return [Point(*p) for p in zip([*grid.t, None], grid.alpha, grid.sigma, grid.half_log_snr, strict=True)]


def stages(grid: Grid, fractions: tuple[float, ...]) -> list[list[Point]]:
    """The points at these fractions of every step, in l; none in a step of infinite length."""
    l = grid.half_log_snr
    finite = np.isfinite(l[1:]) & np.isfinite(l[:-1])
    if not np.any(finite):
        return [[] for _ in finite]
    start, end = l[:-1][finite, None], l[1:][finite, None]
    inside = start + (end - start) * np.array(fractions)  # [finite steps, fractions]
    t = grid.schedule.inverse(2 * inside)  # all in one call: a trained schedule is inverted by bisection
    columns = (np.asarray(c).tolist() for c in (t, *grid.schedule.alpha_sigma(t), inside))
    rows = iter([[Point(*p) for p in zip(*row, strict=True)] for row in zip(*columns, strict=True)])
    return [next(rows) if ok else [] for ok in finite]


def integrals(z: float, count: int) -> list[float]:
    """I_0(z) .. I_{count-1}(z)."""
    if abs(z) < 1:
        # The Taylor series: by parts, as below, loses all digits where z is small.
        def beta(j, m):
            return math.factorial(j) / math.factorial(j + m + 1)

        return [z * sum((-z) ** m * beta(j, m) for m in range(20)) for j in range(count)]
    out = [-math.expm1(-z)]
    for j in range(1, count):
        out.append(1 - j / z * out[-1])
    return out


def weights(moments: list[float], nodes: list[float]) -> np.ndarray:
    """What each prediction counts for, if the integral of v^j is moments[j] and predictions were made at v = nodes.

    They are exact for the polynomial through the predictions: sum_k w_k nodes_k^j = moments_j.
    """
    return np.linalg.solve(np.vander(nodes, increasing=True).T, np.array(moments))


def first_order(x: Linear, D: Linear, a: Point, b: Point) -> Linear:
    """DDIM: the prediction stays what it is. The same in both forms, and finite from alpha = 0 and to sigma = 0."""
    return (b.sigma / a.sigma) * x - b.alpha * math.expm1(a.l - b.l) * D


class Form(NamedTuple):
    """Whether the data or the noise prediction is integrated."""

    noise: bool

    def predicted(self, D: Linear, p: Point) -> Linear:
        """D, or eps = (x - alpha D) / sigma of the latest evaluation. From alpha = 0 no step needs it."""
        if not self.noise or p.alpha == 0:
            return D
        return -p.alpha / p.sigma * D.steps.remember(D, -1 / p.alpha)

    def z(self, a: Point, b: Point) -> float:
        return a.l - b.l if self.noise else b.l - a.l

    def step(
        self,
        x: Linear,
        a: Point,
        b: Point,
        past: list[tuple[float, Linear]],
        moments: list[float],
        ratio: float | None = None,
    ) -> Linear:
        """x_b from x at a and as many (l, prediction) as moments, the first of them made at a."""
        w = weights(moments, [0.0, *((l - a.l) / (b.l - a.l) for l, _ in past[1:])])
        kept, scale = (b.alpha / a.alpha, b.sigma) if self.noise else (b.sigma / a.sigma, b.alpha)
        out = (kept if ratio is None else ratio) * x
        for w_k, (_, prediction) in zip(w, past, strict=True):
            out = out + scale * w_k * prediction
        return out


DATA, NOISE = Form(noise=False), Form(noise=True)


def multistep_order(n: int, path: list[Point], order: int) -> int:
    """The highest order up to `order` that step n can have: no polynomial reaches over an infinite step."""
    infinite = [not math.isfinite(p.l) for p in path[: n + 2]]
    if infinite[n] or infinite[n + 1]:
        return 1
    return min(order, n + 1 - sum(infinite))  # only the first point can be at -inf, only the last at inf


def multistep(
    grid: Grid,
    form: Form,
    order: int,
    moments: Callable[[float, int], list[float]],
    lower_order_final: bool,
    name: str,
    eta: float = 0.0,
    s_noise: float = 1.0,
) -> Table:
    """One evaluation a step and a polynomial through the latest `order` predictions; fewer at the start.

    moments: (z, k) -> what stands for I_0(z) .. I_{k-1}(z).
    lower_order_final: with fewer than 15 steps the last is of first order and the one before of second at most.
        A step that lands on sigma = 0, where h is infinite, is of first order in any case.
    eta: the share of the reverse SDE's noise, 0 for the ODE; with data prediction only. The SDE is solved by
        x_b = sigma_b / sigma_a e^{-eta h} x_a + alpha_b int D(v) z e^{-z(1-v)} dv + s_noise c xi,
        z = (1 + eta) h, c^2 = sigma_b^2 (1 - e^{-2 eta h}); Lu et al. 2022b for eta = 1.
    """
    path, steps = points(grid), Steps(grid)
    x = steps.x
    past: list[tuple[float, Linear]] = []
    for n, (a, b) in enumerate(itertools.pairwise(path)):
        D = steps.denoise(x, a.t)
        past = [(a.l, form.predicted(D, a)), *past][:order]
        k = multistep_order(n, path, order)
        if lower_order_final and len(grid.t) < 15:
            k = min(k, len(grid.t) - n)
        if eta:
            h = b.l - a.l
            mean = form.step(x, a, b, past[:k], moments((1 + eta) * h, k), b.sigma / a.sigma * math.exp(-eta * h))
            x = mean + s_noise * b.sigma * math.sqrt(-math.expm1(-2 * eta * h)) * steps.noise()
        elif k == 1:
            x = first_order(x, D, a, b)
        else:
            x = form.step(x, a, b, past[:k], moments(form.z(a, b), k))
    return steps.table(x, name)


def check_order(solver: str, order: int, highest: int) -> None:
    if order not in range(1, highest + 1):
        raise UserError(f"order={order} of solver {solver!r} must be a whole number from 1 to {highest}")
