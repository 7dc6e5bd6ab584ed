"""DPM-Solver++ (Lu et al. 2022b): exponential integrators in lambda/2 for the denoised prediction."""

import numpy as np

from jax_diffusion.solvers.table import Grid, Table, rows


def dpmpp_2m(grid: Grid, lower_order_final: bool = True) -> Table:
    """The two-step multistep solver, algorithm 2: second order at one evaluation a step.

    x_s = sigma_s / sigma_t x_t - alpha_s (e^-h - 1) D~,    D~ = (1 + 1/2r) D_n - 1/2r D_{n-1},
    h the step in log(alpha / sigma), r = h_{n-1} / h_n.

    The first step is of first order; so is the one landing on sigma = 0, where h is infinite; and with
    lower_order_final the last step of fewer than 15 in any case (section 4.2 and the authors' code).
    """
    alpha, sigma, half_log_snr = grid.alpha, grid.sigma, grid.log_snr / 2
    h = np.diff(half_log_snr)
    steps = len(h)
    weight = -alpha[1:] * np.expm1(-h)
    back = np.zeros(steps)  # 1 / 2r
    # No slope over an infinite step: a flow's first leaves alpha = 0, and the last lands on sigma = 0.
    finite = np.isfinite(h[1:]) & np.isfinite(h[:-1])
    back[1:][finite] = h[1:][finite] / h[:-1][finite] / 2
    if lower_order_final and steps < 15:
        back[-1] = 0.0
    B = np.stack([weight * (1 + back), -weight * back], axis=1)
    return rows(grid.t, A=sigma[1:] / sigma[:-1], B=B, scale=grid.prior_scale, name="dpmpp_2m")
