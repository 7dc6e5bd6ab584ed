"""DPM2: the midpoint method of k-diffusion's `sample_dpm_2`, with the midpoint in log sigma.

It is DPM-Solver-2 (Lu et al. 2022a, algorithm 1, whose intermediate point is the middle in log SNR) with the slope
held constant in sigma instead of exponentially integrated (Karras et al. 2022, sections 3 and B).
"""

import itertools

import numpy as np

from jax_diffusion.solvers.steps import Steps
from jax_diffusion.solvers.straight import at_u, churn, points
from jax_diffusion.solvers.table import Grid, Table


def dpm2(grid: Grid, S_churn: float = 0.0, S_tmin: float = 0.0, S_tmax: float = np.inf, S_noise: float = 1.0) -> Table:
    """y' = y + (u' - u) slope(sqrt(u u')): second order, two evaluations a step and one for the last.

    S_churn, S_tmin, S_tmax, S_noise: see straight.churn.
    """
    steps = Steps(grid)
    x = steps.x
    for here, there in itertools.pairwise(points(grid)):
        x, here = churn(steps, x, here, S_churn, S_tmin, S_tmax, S_noise)
        y = x / here.s
        slope = (y - steps.denoise(x, here.t)) / here.u
        if there.u > 0:
            middle = at_u(grid, np.sqrt(here.u * there.u))
            y_middle = y + (middle.u - here.u) * slope
            slope = (y_middle - steps.denoise(middle.s * y_middle, middle.t)) / middle.u
        x = there.s * (y + (there.u - here.u) * slope)
    return steps.table(x, f"dpm2(S_churn={S_churn:g})" if S_churn else "dpm2")
