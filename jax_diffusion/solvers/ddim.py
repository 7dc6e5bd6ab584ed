"""DDIM (Song, Meng & Ermon 2021, eq. 12 and 16)."""

import numpy as np

from jax_diffusion.posterior import coefficients
from jax_diffusion.solvers.table import Grid, Table, rows


def ddim(grid: Grid, eta: float = 0.0) -> Table:
    """x_s = alpha_s D + sqrt(sigma_s^2 - c^2) eps_hat + c xi, with c^2 = eta^2 times the posterior variance.

    eta = 0 is deterministic and first order; eta = 1 has DDPM's (fixed_small) marginal step.
    """
    alpha, sigma, l = grid.alpha, grid.sigma, grid.log_snr
    variance = coefficients(l[:-1], l[1:], alpha[:-1], alpha[1:], sigma[:-1], sigma[1:], xp=np)[2]
    c = eta * np.sqrt(variance)
    direction = np.sqrt(np.maximum(sigma[1:] ** 2 - c**2, 0.0))
    # eps_hat = (x - alpha D) / sigma
    A = direction / sigma[:-1]
    B = alpha[1:] - direction * alpha[:-1] / sigma[:-1]
    return rows(grid.t, A=A, B=B, C=c, scale=grid.prior_scale, name=f"ddim(eta={eta:g})")
