"""DDPM's ancestral sampler (Ho et al. 2020, algorithm 2), between any two points of a schedule."""

import numpy as np

from jax_diffusion.errors import choose
from jax_diffusion.posterior import coefficients
from jax_diffusion.solvers.table import Grid, Table, rows


def ddpm(grid: Grid, variance: str = "fixed_small") -> Table:
    """x_s ~ q(x_s | x_t, x_0 = D), one evaluation a step.

    variance: fixed_small  beta~, the posterior's own
              fixed_large  beta, the transition's
              learned      between the two, as the network says (Nichol & Dhariwal 2021, eq. 15)
    """
    choose("variance", variance, ("fixed_small", "fixed_large", "learned"))
    l, alpha, sigma = grid.log_snr, grid.alpha, grid.sigma
    w_x, w_0, small, large = coefficients(
        l[:-1], l[1:], alpha[:-1], alpha[1:], sigma[:-1], sigma[1:], xp=np
    )  # fmt: skip
    # No noise where the step lands on sigma = 0: gated on the target, not on t.
    lands = sigma[1:] == 0
    small = np.where(lands, 0.0, small)
    large = np.where(lands, 0.0, large)
    C = np.sqrt(large if variance == "fixed_large" else small)
    C_max = np.sqrt(large) if variance == "learned" else C
    return rows(grid.t, w_x, w_0, C, C_max=C_max, scale=grid.prior_scale, name=f"ddpm({variance})")
