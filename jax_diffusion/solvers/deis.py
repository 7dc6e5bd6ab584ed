"""DEIS (Zhang & Chen 2023): Adams-Bashforth for the noise prediction, with the linear part solved exactly."""

from jax_diffusion.solvers.exponential import NOISE, check_order, integrals, multistep
from jax_diffusion.solvers.table import Grid, Table


def deis(grid: Grid, order: int = 3, lower_order_final: bool = True) -> Table:
    """In rho = sigma / alpha, where d(x / alpha) = eps d rho (section 3.3):

    x_b / alpha_b = x_a / alpha_a + int_{rho_a}^{rho_b} P(log rho) d rho,

    P the polynomial through the last `order` eps in log rho, as in the authors' code and diffusers ("logrho").
    One in rho itself, the paper's rhoAB, is the solver lms.

    lower_order_final: with fewer than 15 steps the last is of first order and the one before of second at most,
        as in diffusers. A step that lands on sigma = 0 is of first order in any case.
    """
    check_order("deis", order, 3)
    return multistep(grid, NOISE, order, integrals, lower_order_final, f"deis(order={order})")
