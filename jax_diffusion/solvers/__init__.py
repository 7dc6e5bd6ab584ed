"""Solvers as tables. `make("ddim", schedule, steps=50, eta=0.0)` builds one, `sample` runs any."""

from jax_diffusion.errors import UserError, check_options, choose
from jax_diffusion.schedules import Schedule
from jax_diffusion.solvers import grids
from jax_diffusion.solvers.ddim import ddim
from jax_diffusion.solvers.ddpm import ddpm
from jax_diffusion.solvers.dpmpp import dpmpp_2m
from jax_diffusion.solvers.euler import euler, heun
from jax_diffusion.solvers.table import Grid, Table, add_noise_to, sample, sample_keys

__all__ = ["SOLVERS", "Grid", "Table", "add_noise_to", "grids", "make", "sample", "sample_keys"]

SOLVERS = {"ddpm": ddpm, "ddim": ddim, "euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m}

_GRID_OPTIONS = ("offset", "rho", "final")


def make(name: str, schedule: Schedule, steps: int, grid: str | Grid | None = None, **options) -> Table:
    """The table of solver `name` with `steps` steps on a schedule.

    grid: a spacing by name (solvers/grids.py), a Grid, or None for the schedule's default.
    options: the solver's own (eta, variance, ...) and the grid's (offset, rho, final).

    >>> print(make("dpmpp_2m", schedules.make("cosine"), steps=20))
    """
    solver = SOLVERS[choose("solver", name, SOLVERS)]
    grid_options = {k: options.pop(k) for k in _GRID_OPTIONS if k in options}
    check_options(f"solver {name!r}", solver, options, positional=1)
    check_options("the grid", grids.make, grid_options, positional=3)
    if isinstance(grid, Grid):
        if grid_options:
            raise UserError(f"{', '.join(grid_options)}: these belong to making a grid, and one was given")
        return solver(grid, **options)
    return solver(grids.make(schedule, steps, grid, **grid_options), **options)
