"""Heun's method on the probability-flow ODE, with churn (Karras et al. 2022, algorithms 1 and 2)."""

import itertools

import numpy as np

from jax_diffusion.solvers.steps import Linear, Steps
from jax_diffusion.solvers.straight import Point, churn, points
from jax_diffusion.solvers.table import Grid, Table


def heun_step(steps: Steps, x: Linear, here: Point, there: Point) -> Linear:
    """The trapezoid: an Euler step, then the mean of the slopes at both ends; Euler alone where u lands on 0."""
    du = there.u - here.u
    y = x / here.s
    slope = (y - steps.denoise(x, here.t)) / here.u
    guess = y + du * slope
    if there.u == 0:
        return there.s * guess
    slope_there = (guess - steps.denoise(there.s * guess, there.t)) / there.u
    return there.s * (y + du * (slope + slope_there) / 2)


def heun(grid: Grid, S_churn: float = 0.0, S_tmin: float = 0.0, S_tmax: float = np.inf, S_noise: float = 1.0) -> Table:
    """Karras et al. 2022, algorithm 2; with S_churn = 0 algorithm 1, deterministic and of second order.

    Two evaluations a step and one for the last, which lands on sigma = 0: 2N - 1 rows.
    S_churn, S_tmin, S_tmax, S_noise: see straight.churn. The paper's for ImageNet: 40, 0.05, 50, 1.003.
    """
    steps = Steps(grid)
    x = steps.x
    for here, there in itertools.pairwise(points(grid)):
        x, here = churn(steps, x, here, S_churn, S_tmin, S_tmax, S_noise)
        x = heun_step(steps, x, here, there)
    return steps.table(x, f"heun(S_churn={S_churn:g})" if S_churn else "heun")
