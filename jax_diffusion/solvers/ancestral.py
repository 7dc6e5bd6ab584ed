"""Ancestral sampling (k-diffusion): an ODE step to less noise than asked for, and fresh noise to make up for it.

From noise a = sigma_t / alpha_t to b = sigma_s / alpha_s a step is solved down to `down` and `up` is added,

    up^2 = eta^2 b^2 (1 - b^2 / a^2),    down^2 = b^2 - up^2,

so that eta = 1 has the posterior's variance q(x_s | x_t, x_0), DDPM's, and eta = 0 is the ODE (Song, Meng & Ermon
2021, eq. 16, of which this is the variance-exploding form).
"""

import itertools

import numpy as np

from jax_diffusion.solvers.steps import Steps
from jax_diffusion.solvers.straight import Point, at_noise, at_u, points
from jax_diffusion.solvers.table import Grid, Table


def split(here: Point, there: Point, eta: float) -> tuple[float, float]:
    """(down, up): the noise that the ODE step lands on, and that which is added; never more than all of it."""
    b, r = there.noise, there.noise / here.noise
    up = min(eta * b * np.sqrt(max(1 - r**2, 0.0)), b)
    # b^2 - up^2, said without the difference: with eta = 1 it would lose r^2's digits.
    down = b * np.sqrt(max(1 - eta**2 + (eta * r) ** 2, 0.0))
    return down, up


def euler_ancestral(grid: Grid, eta: float = 1.0, S_noise: float = 1.0) -> Table:
    """k-diffusion's Euler a: x' / alpha' = D + (down / a) (x / alpha - D) + up xi. DDIM with that eta, first order.

    S_noise: factor of the added noise's standard deviation.
    """
    steps = Steps(grid)
    x = steps.x
    for here, there in itertools.pairwise(points(grid)):
        D = steps.denoise(x, here.t)
        down, up = split(here, there, eta)
        # (down / a) x / alpha, said without alpha, which may be zero at the first point.
        to = D + down / here.sigma * (x - here.alpha * D)
        x = there.alpha * (to + S_noise * up * steps.noise())
    return steps.table(x, f"euler_ancestral(eta={eta:g})")


def dpm2_ancestral(grid: Grid, eta: float = 1.0, S_noise: float = 1.0) -> Table:
    """DPM2's midpoint step (dpm2.py) to `down`, then noise: two evaluations a step and one for the last.

    k-diffusion's sample_dpm_2_ancestral. Where `down` is 0 (the last step; pure noise) the step is Euler's.
    """
    steps = Steps(grid)
    x = steps.x
    for here, there in itertools.pairwise(points(grid)):
        down, up = split(here, there, eta)
        u_down, s_down = grid.frame(1.0, down)  # of the state over alpha
        y = x / here.s
        slope = (y - steps.denoise(x, here.t)) / here.u
        if down > 0:
            # In log(sigma / alpha): with eta = 1 that is the next point. From pure noise, in log u.
            u = grid.frame(1.0, np.sqrt(here.noise * down))[0] if here.alpha else np.sqrt(here.u * u_down)
            middle = at_u(grid, u)
            y_middle = y + (middle.u - here.u) * slope
            slope = (y_middle - steps.denoise(middle.s * y_middle, middle.t)) / middle.u
        x = there.alpha * (s_down * (y + (u_down - here.u) * slope) + S_noise * up * steps.noise())
    return steps.table(x, f"dpm2_ancestral(eta={eta:g})")


def dpmpp_2s_ancestral(grid: Grid, eta: float = 1.0, S_noise: float = 1.0) -> Table:
    """DPM-Solver++(2S) (Lu et al. 2022b, algorithm 1 with r = 1/2) to `down`, then noise; two evaluations a step.

    k-diffusion's sample_dpmpp_2s_ancestral: with z = x / alpha and h the step in -log(sigma / alpha), on which the
    exponential integrator holds the prediction of the middle constant,

        z_mid  = sqrt(down / a) z + (1 - e^{-h/2}) D,       z_down = (down / a) z + (1 - e^{-h}) D_mid.
    """
    steps = Steps(grid)
    x = steps.x
    for here, there in itertools.pairwise(points(grid)):
        down, up = split(here, there, eta)
        D = steps.denoise(x, here.t)
        ratio = down / here.noise
        if ratio > 0:
            middle = at_noise(grid, np.sqrt(down * here.noise))
            z_middle = np.sqrt(ratio) * (x / here.alpha) + (1 - np.sqrt(ratio)) * D
            D = steps.denoise(middle.alpha * z_middle, middle.t)
        # (down / a) x / alpha, said without alpha, which may be zero at the first point.
        to = down / here.sigma * x + (1 - ratio) * D
        x = there.alpha * (to + S_noise * up * steps.noise())
    return steps.table(x, f"dpmpp_2s_ancestral(eta={eta:g})")
