"""DPM-Solver++ (Lu et al. 2022b): exponential integrators for the data prediction D (solvers/exponential.py).

name           evaluations a step   order
dpmpp_2m       1                    2        algorithm 2
dpmpp_3m       1                    3        its third-order sequel
dpmpp_2s       2                    2        algorithm 1
dpmpp_3s       3                    3        its third-order sequel
sde_dpmpp_2m   1, with noise                 their section on SDEs
sde_dpmpp_3m   1, with noise
"""

from jax_diffusion.errors import choose
from jax_diffusion.solvers.exponential import DATA, integrals, multistep
from jax_diffusion.solvers.singlestep import singlestep
from jax_diffusion.solvers.table import Grid, Table


def moments_of(solver_type: str, half_curvature: bool = False):
    """What stands for I_0, I_1, I_2 in a multistep method, as the papers and their code have it.

    solver_type: of its second-order steps, which third-order methods begin (and, with few steps, end) with.
        midpoint  I_1 = I_0 / 2, the line's value half-way: the papers' D~
        heun      I_1 itself, the line's exact integral; named as in diffusers
    half_curvature: half of I_2. The authors' code, k-diffusion and diffusers weight the second divided difference,
        which is h^2 D'' / 2, as if it were h^2 D''. It leaves their third-order methods at second order.
    """
    choose("solver_type", solver_type, ("midpoint", "heun"))

    def moments(z: float, k: int) -> list[float]:
        I = integrals(z, k)
        if k == 2 and solver_type == "midpoint":
            return [I[0], I[0] / 2]
        return [*I[:2], I[2] / 2] if k == 3 and half_curvature else I

    return moments


def dpmpp_2m(grid: Grid, lower_order_final: bool = True, solver_type: str = "midpoint") -> Table:
    """The two-step multistep solver, algorithm 2: second order at one evaluation a step.

    x_s = sigma_s / sigma_t x_t - alpha_s (e^-h - 1) D~,    D~ = (1 + 1/2r) D_n - 1/2r D_{n-1},

    h the step in log(alpha / sigma), r = h_{n-1} / h_n; solver_type="heun" integrates the same line exactly.
    The first step is of first order; so is the one landing on sigma = 0, where h is infinite; and with
    lower_order_final the last step of fewer than 15 in any case (section 4.2 and the authors' code).
    """
    return multistep(grid, DATA, 2, moments_of(solver_type), lower_order_final, "dpmpp_2m")


def dpmpp_3m(
    grid: Grid, lower_order_final: bool = True, solver_type: str = "heun", half_curvature: bool = False
) -> Table:
    """The three-step multistep solver: the parabola through the last three D, integrated exactly.

    The first two steps are of orders 1 and 2, as are with lower_order_final the last two of fewer than 15, reversed.
    diffusers has solver_type="midpoint" (by default) and half_curvature; see moments_of.
    """
    return multistep(grid, DATA, 3, moments_of(solver_type, half_curvature), lower_order_final, "dpmpp_3m")


def sde_dpmpp_2m(
    grid: Grid, eta: float = 1.0, s_noise: float = 1.0, lower_order_final: bool = True, solver_type: str = "midpoint"
) -> Table:
    """SDE-DPM-Solver++(2M): dpmpp_2m for the reverse SDE.

    eta: share of the SDE's noise (as in k-diffusion); 0 is dpmpp_2m.  s_noise: factor of that noise alone.
    """
    name = f"sde_dpmpp_2m(eta={eta:g})"
    return multistep(grid, DATA, 2, moments_of(solver_type), lower_order_final, name, eta, s_noise)


def sde_dpmpp_3m(
    grid: Grid,
    eta: float = 1.0,
    s_noise: float = 1.0,
    lower_order_final: bool = True,
    solver_type: str = "heun",
    half_curvature: bool = False,
) -> Table:
    """dpmpp_3m for the reverse SDE (k-diffusion's 3M SDE, with half_curvature). Options as in sde_dpmpp_2m."""
    name = f"sde_dpmpp_3m(eta={eta:g})"
    return multistep(grid, DATA, 3, moments_of(solver_type, half_curvature), lower_order_final, name, eta, s_noise)


def dpmpp_2s(grid: Grid, solver_type: str = "midpoint", share_steps: bool = False) -> Table:
    """The singlestep solver of second order, algorithm 1 with r = 1/2: two evaluations a step."""
    return singlestep(grid, DATA, 2, solver_type, share_steps, "dpmpp_2s")


def dpmpp_3s(grid: Grid, solver_type: str = "midpoint", share_steps: bool = False) -> Table:
    """The singlestep solver of third order (the authors' code): three evaluations a step."""
    return singlestep(grid, DATA, 3, solver_type, share_steps, "dpmpp_3s")
