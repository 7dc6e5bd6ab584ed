"""Euler on the probability-flow ODE (Karras et al. 2022), with churn.

Written in the straight frame (solvers/straight.py), where dy/du = (y - D) / u on every schedule: u is EDM's sigma,
or a flow's t. Without churn it is DDIM.
"""

import itertools

import numpy as np

from jax_diffusion.solvers.steps import Steps
from jax_diffusion.solvers.straight import churn, points
from jax_diffusion.solvers.table import Grid, Table


def euler(grid: Grid, S_churn: float = 0.0, S_tmin: float = 0.0, S_tmax: float = np.inf, S_noise: float = 1.0) -> Table:
    """y' = y + (u' - u) (y - D) / u, one evaluation a step, first order.

    S_churn, S_tmin, S_tmax, S_noise: algorithm 2's stochasticity (straight.churn); 0 is deterministic.
    """
    steps = Steps(grid)
    x = steps.x
    for here, there in itertools.pairwise(points(grid)):
        x, here = churn(steps, x, here, S_churn, S_tmin, S_tmax, S_noise)
        y = x / here.s
        D = steps.denoise(x, here.t)
        x = there.s * (y + (there.u - here.u) * (y - D) / here.u)
    return steps.table(x, f"euler(S_churn={S_churn:g})" if S_churn else "euler")
