"""PNDM's pseudo numerical methods (Liu et al. 2022): classical weights around DDIM's transfer.

The transfer takes a state from t to t' as DDIM would if its noise were eps. In the straight frame (solvers/table.py)
it is y' = y + (u' - u) slope, where the slope is eps, or a flow's velocity (eps alone does not lead away from
alpha = 0). The weights are those for equal steps: "pseudo", since steps may be equal in t but are not in u. Hence
second order, as the paper proves, and the classical one where steps are equal in u.
"""

import numpy as np

from jax_diffusion.solvers.exponential import check_order, weights
from jax_diffusion.solvers.steps import Linear, Steps
from jax_diffusion.solvers.table import Grid, Table


def plms(grid: Grid, order: int = 4, lower_order_final: bool = True) -> Table:
    """Pseudo linear multistep, orders 1, 2, 3 until there are `order` slopes to combine: N + 1 evaluations.

    The first step is a pseudo trapezoid: transferred once, evaluated there, and transferred again with the mean of both
    slopes (latent diffusion's sampler; diffusers' PNDMScheduler with skip_prk_steps).

    lower_order_final: a step that lands on sigma = 0 is x = D, first order; False keeps its order, as diffusers does.
    """
    return _linear_multistep(grid, order, lower_order_final, runge_kutta=False)


def pndm(grid: Grid, lower_order_final: bool = True) -> Table:
    """The paper's F-PNDM, algorithm 2: three pseudo Runge-Kutta steps, then PLMS of order 4. N + 9 evaluations."""
    return _linear_multistep(grid, 4, lower_order_final, runge_kutta=True)


def adams_bashforth(k: int) -> np.ndarray:
    """1; 3/2, -1/2; 23/12, -16/12, 5/12; 55/24, -59/24, 37/24, -9/24."""
    return weights([1 / (j + 1) for j in range(k)], [-float(i) for i in range(k)])


def _linear_multistep(grid: Grid, order: int, lower_order_final: bool, runge_kutta: bool) -> Table:
    check_order("plms", order, 4)
    u, s = grid.straight
    steps = Steps(grid)

    def slope(y: Linear, u: float, s: float, t: float) -> Linear:
        return steps.remember(steps.denoise(s * y, t), -1 / s) / -u  # (y - D) / u

    y = steps.x / s[0]
    slopes: list[Linear] = []
    last = len(grid.t) - 1
    for n, t in enumerate(grid.t):
        slopes = [slope(y, u[n], s[n], t), *slopes][:order]
        du = u[n + 1] - u[n]
        if runge_kutta and n < 3 and n < last:
            y = y + du * _runge_kutta(slope, y, slopes[0], grid, n)
        elif n == 0 and order > 1 and n < last:
            there = slope(y + du * slopes[0], u[1], s[1], grid.t[1])
            y = y + du * (slopes[0] + there) / 2
        else:
            k = 1 if lower_order_final and u[n + 1] == 0 else len(slopes)
            for w, e in zip(adams_bashforth(k), slopes, strict=False):
                y = y + du * w * e
    return steps.table(s[-1] * y, "pndm" if runge_kutta else f"plms(order={order})")


def _runge_kutta(slope, y: Linear, first: Linear, grid: Grid, n: int) -> Linear:
    """The pseudo Runge-Kutta mean slope from point n to n + 1, with two evaluations half-way in t."""
    t = (grid.t[n] + grid.t[n + 1]) / 2
    u_mid, s_mid = grid.frame(*grid.schedule.alpha_sigma(np.float64(t)))
    u, s = grid.straight
    second = slope(y + (u_mid - u[n]) * first, u_mid, s_mid, t)
    third = slope(y + (u_mid - u[n]) * second, u_mid, s_mid, t)
    fourth = slope(y + (u[n + 1] - u[n]) * third, u[n + 1], s[n + 1], grid.t[n + 1])
    return (first + 2 * second + 2 * third + fourth) / 6
