"""Linear multistep on the probability-flow ODE, with the steps' true lengths (k-diffusion's LMS).

Written in the straight frame (solvers/table.py), where dy/du = (y - D) / u.
"""

from jax_diffusion.solvers.exponential import check_order, weights
from jax_diffusion.solvers.steps import Linear, Steps
from jax_diffusion.solvers.table import Grid, Table


def lms(grid: Grid, order: int = 4, lower_order_final: bool = True) -> Table:
    """Adams-Bashforth on unequal steps: the polynomial in u through the last `order` slopes, integrated exactly.

    The first steps are of lower order. On variance-preserving schedules this is DEIS with a polynomial in
    rho = sigma / alpha.

    lower_order_final: a step that lands on sigma = 0 is x = D, first order; False keeps its order there too, as
        k-diffusion and diffusers do.
    """
    check_order("lms", order, 4)
    u, s = grid.straight
    steps = Steps(grid)
    y = steps.x / s[0]
    slopes: list[Linear] = []
    for n, t in enumerate(grid.t):
        D = steps.denoise(s[n] * y, t)
        slopes = [steps.remember(D, -1 / s[n]) / -u[n], *slopes][:order]  # (y - D) / u
        du = u[n + 1] - u[n]
        k = 1 if lower_order_final and u[n + 1] == 0 else len(slopes)
        w = weights([1 / (j + 1) for j in range(k)], (u[n - k + 1 : n + 1][::-1] - u[n]) / du)
        for w_k, slope in zip(w, slopes, strict=False):
            y = y + du * w_k * slope
    return steps.table(s[-1] * y, f"lms(order={order})")
