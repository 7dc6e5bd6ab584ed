"""Restart sampling (Xu et al. 2023, algorithm 1): Heun, with stretches of noise gone through again.

The ODE is fast and keeps its errors; noise forgets them. A restart interval [t_min, t_max] is noised again in one
go, from where the main grid reaches t_min, and solved backwards, K times: x_{t_max} = x_{t_min} + sqrt(t_max^2 -
t_min^2) S_noise xi. All noise levels are sigma / alpha, which is EDM's sigma.
"""

import itertools

import numpy as np

from jax_diffusion.errors import UserError
from jax_diffusion.solvers.heun import heun_step
from jax_diffusion.solvers.steps import Steps
from jax_diffusion.solvers.straight import Point, at_noise, points, raise_noise
from jax_diffusion.solvers.table import Grid, Table

# (t_min, t_max, N, K): the authors' for CIFAR-10, 43 evaluations with 18 steps.
CIFAR10 = ((0.14, 0.30, 3, 2),)


def restart(grid: Grid, intervals=CIFAR10, S_noise: float = 1.0) -> Table:
    """Heun along the grid; 2 N_main - 1 + sum 2 K (N - 1) rows.

    intervals: of (t_min, t_max, N, K): the ends, the number N of points between them (ends included, spaced as in
        Karras et al. 2022, eq. 5), and how often. As text "t_min:t_max:N:K,...".
    t_min is brought to the grid's nearest point, as in the authors' code; a grid without one below t_max is given it.
    """
    intervals = [checked(i) for i in (parse(intervals) if isinstance(intervals, str) else intervals)]
    stops = points(grid)
    after: dict[float, list] = {}  # noise of a stop -> the intervals above it
    for t_min, t_max, n, k in intervals:
        most = at_noise(grid, t_max).noise
        if t_max > most * (1 + 1e-6):
            raise UserError(f"intervals: t_max={t_max:g} is above the schedule's noise: give at most {most:.4g}")
        low = min((p for p in stops[1:] if p.sigma > 0), key=lambda p: abs(p.noise - t_min), default=None)
        if low is None or low.noise >= t_max:
            low = at_noise(grid, t_min)
            stops = sorted([*stops, low], key=lambda p: -p.noise)
        after.setdefault(low.noise, []).append((low, t_max, n, k))
    steps = Steps(grid)
    x = steps.x
    for here, there in itertools.pairwise(stops):
        x = heun_step(steps, x, here, there)
        for low, t_max, n, k in after.get(there.noise, []):
            way = stretch(grid, low, t_max, n)
            for _ in range(k):
                x = raise_noise(steps, x, low, way[0], S_noise)
                for a, b in itertools.pairwise(way):
                    x = heun_step(steps, x, a, b)
    return steps.table(x, "restart(" + ", ".join("{:g}:{:g}:{}:{}".format(*i) for i in intervals) + ")")


def stretch(grid: Grid, low: Point, t_max: float, n: int, rho: float = 7.0) -> list[Point]:
    """n points from t_max down to `low`, sigma^(1/rho) uniform."""
    noise = np.linspace(t_max ** (1 / rho), low.noise ** (1 / rho), n) ** rho
    return [*(at_noise(grid, b) for b in noise[:-1]), low]


def parse(text: str) -> list[tuple]:
    """ "0.14:0.3:3:2,1:2:4:1" -> [(0.14, 0.3, 3, 2), (1, 2, 4, 1)]."""
    try:
        return [tuple(float(word) for word in part.split(":")) for part in text.split(",")]
    except ValueError:
        raise UserError(f"intervals={text!r}: write t_min:t_max:N:K, for instance 0.14:0.3:3:2") from None


def checked(interval) -> tuple[float, float, int, int]:
    if len(interval) != 4:
        raise UserError(f"intervals: {interval} should be four numbers, t_min, t_max, N and K, as (0.14, 0.3, 3, 2)")
    t_min, t_max, n, k = interval
    if not 0 < t_min < t_max or n != int(n) or n < 2 or k != int(k) or k < 1:
        raise UserError(f"intervals: {tuple(interval)} needs 0 < t_min < t_max, N of at least 2 and K of at least 1")
    return float(t_min), float(t_max), int(n), int(k)
