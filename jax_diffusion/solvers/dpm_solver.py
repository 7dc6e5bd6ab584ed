"""DPM-Solver (Lu et al. 2022a): exponential integrators for the noise prediction (solvers/exponential.py).

    name            evaluations a step   order
    dpm_solver_1    1                    1       eq. 3.7, which is DDIM
    dpm_solver_2    2                    2       algorithm 1 with r_1 = 1/2
    dpm_solver_3    3                    3       algorithm 2 with r_1 = 1/3, r_2 = 2/3
    dpm_solver_2m   1                    2       multistep, as in the authors' code
    dpm_solver_3m   1                    3

The multistep ones are DEIS in other words (deis.py), where rho = e^-l. dpm2 is another method: a midpoint in sigma.
"""

from jax_diffusion.solvers.dpmpp import moments_of
from jax_diffusion.solvers.exponential import NOISE, integrals, multistep
from jax_diffusion.solvers.singlestep import singlestep
from jax_diffusion.solvers.table import Grid, Table


def dpm_solver_1(grid: Grid) -> Table:
    """x_s = alpha_s / alpha_t x_t - sigma_s (e^h - 1) eps, h the step in log(alpha / sigma)."""
    return multistep(grid, NOISE, 1, integrals, lower_order_final=False, name="dpm_solver_1")


def dpm_solver_2(grid: Grid, solver_type: str = "midpoint", share_steps: bool = False) -> Table:
    """The singlestep solver of second order: two evaluations a step."""
    return singlestep(grid, NOISE, 2, solver_type, share_steps, "dpm_solver_2")


def dpm_solver_3(grid: Grid, solver_type: str = "midpoint", share_steps: bool = False) -> Table:
    """The singlestep solver of third order: three evaluations a step."""
    return singlestep(grid, NOISE, 3, solver_type, share_steps, "dpm_solver_3")


def dpm_solver_2m(grid: Grid, lower_order_final: bool = True, solver_type: str = "midpoint") -> Table:
    """The two-step multistep solver. Options as in dpmpp_2m; with solver_type="heun" it is DEIS of order 2."""
    return multistep(grid, NOISE, 2, moments_of(solver_type), lower_order_final, "dpm_solver_2m")


def dpm_solver_3m(
    grid: Grid, lower_order_final: bool = True, solver_type: str = "heun", half_curvature: bool = False
) -> Table:
    """The three-step multistep solver, DEIS of order 3. Options as in dpmpp_3m."""
    return multistep(grid, NOISE, 3, moments_of(solver_type, half_curvature), lower_order_final, "dpm_solver_3m")
