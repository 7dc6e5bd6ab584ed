"""DDIM (Song, Meng & Ermon 2021, eq. 12 and 16)."""

import numpy as np

from jax_diffusion.posterior import coefficients
from jax_diffusion.solvers.steps import Steps
from jax_diffusion.solvers.table import Grid, Table


def ddim(grid: Grid, eta: float = 0.0, use_clipped_model_output: bool = True) -> Table:
    """x_s = alpha_s D + sqrt(sigma_s^2 - c^2) eps_hat + c xi, with c^2 = eta^2 times the posterior variance.

    eta = 0 is deterministic and first order; eta = 1 has DDPM's (fixed_small) marginal step.
    use_clipped_model_output: whether eps_hat is derived from the clipped D (named as in diffusers, whose
        default is False); the two differ only where the denoiser clips.
    """
    alpha, sigma, l = grid.alpha, grid.sigma, grid.log_snr
    variance = coefficients(l[:-1], l[1:], alpha[:-1], alpha[1:], sigma[:-1], sigma[1:], xp=np)[2]
    c = eta * np.sqrt(variance)
    steps = Steps(grid)
    x = steps.x
    for n, t in enumerate(grid.t):
        D = steps.denoise(x, t)
        eps = (x - alpha[n] * (D if use_clipped_model_output else steps.raw(D))) / sigma[n]
        x = alpha[n + 1] * D + np.sqrt(max(sigma[n + 1] ** 2 - c[n] ** 2, 0.0)) * eps + c[n] * steps.noise()
    return steps.table(x, f"ddim(eta={eta:g})")
