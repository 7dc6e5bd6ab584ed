"""Solvers, most of them tables. `make("ddim", schedule, steps=50, eta=0.0)` builds one, `sample` runs any."""

import importlib
from collections.abc import Callable, Sequence

from jax_diffusion.errors import UserError, check_options, choose
from jax_diffusion.schedules import Schedule
from jax_diffusion.solvers import grids
from jax_diffusion.solvers.ancestral import dpm2_ancestral, dpmpp_2s_ancestral, euler_ancestral
from jax_diffusion.solvers.ddim import ddim
from jax_diffusion.solvers.ddpm import ddpm
from jax_diffusion.solvers.deis import deis
from jax_diffusion.solvers.dpm2 import dpm2
from jax_diffusion.solvers.dpm_adaptive import dpm_adaptive
from jax_diffusion.solvers.dpm_solver import (
    dpm_solver_1,
    dpm_solver_2,
    dpm_solver_2m,
    dpm_solver_3,
    dpm_solver_3m,
)
from jax_diffusion.solvers.dpmpp import dpmpp_2m, dpmpp_2s, dpmpp_3m, dpmpp_3s, sde_dpmpp_2m, sde_dpmpp_3m
from jax_diffusion.solvers.euler import euler
from jax_diffusion.solvers.heun import heun
from jax_diffusion.solvers.lms import lms
from jax_diffusion.solvers.noise import add_noise_to, sample_keys
from jax_diffusion.solvers.plms import plms, pndm
from jax_diffusion.solvers.predictor_corrector import predictor_corrector
from jax_diffusion.solvers.repaint import repaint
from jax_diffusion.solvers.restart import restart
from jax_diffusion.solvers.runge_kutta import rk23, rk45
from jax_diffusion.solvers.sampling import Solver, cost, sample
from jax_diffusion.solvers.table import Grid, Table, load
from jax_diffusion.solvers.unipc import unipc

__all__ = [
    "METHODS",
    "SOLVERS",
    "Grid",
    "Solver",
    "Table",
    "add_noise_to",
    "cost",
    "endpoints",
    "grids",
    "load",
    "make",
    "optimize",
    "sample",
    "sample_keys",
]

SOLVERS: dict[str, Callable[..., Table]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler": euler,
    "heun": heun,
    "dpm2": dpm2,
    "plms": plms,
    "pndm": pndm,
    "lms": lms,
    "deis": deis,
    "dpm_solver_1": dpm_solver_1,
    "dpm_solver_2": dpm_solver_2,
    "dpm_solver_3": dpm_solver_3,
    "dpm_solver_2m": dpm_solver_2m,
    "dpm_solver_3m": dpm_solver_3m,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_3m": dpmpp_3m,
    "dpmpp_2s": dpmpp_2s,
    "dpmpp_3s": dpmpp_3s,
    "sde_dpmpp_2m": sde_dpmpp_2m,
    "sde_dpmpp_3m": sde_dpmpp_3m,
    "unipc": unipc,
    "euler_ancestral": euler_ancestral,
    "dpm2_ancestral": dpm2_ancestral,
    "dpmpp_2s_ancestral": dpmpp_2s_ancestral,
    "restart": restart,
    "repaint": repaint,
}

# Not linear in the state, so not tables: steps of each sample's own, Langevin correctors.
METHODS: dict[str, Callable[..., Solver]] = {
    "rk45": rk45,
    "rk23": rk23,
    "dpm_adaptive": dpm_adaptive,
    "predictor_corrector": predictor_corrector,
}

GRID_OPTIONS = grids.OPTIONS

# Room for as many predictions in every table, so that solvers of different order are one compiled program; most need
# 1 to 4, and an unused one costs a multiplication by zero beside a network's evaluation.
MEMORY = 4


def make(
    name: str,
    schedule: Schedule,
    steps: int | None = None,
    grid: str | Sequence[float] | Grid | None = None,
    **options,
) -> Table | Solver:
    """The table of solver `name` with `steps` steps on a schedule, or one of METHODS.

    grid: a spacing by name, or explicit points, which `steps` may be left out with (grids.make); a Grid, whose number
        of steps counts; or None for the schedule's default.
    options: the solver's own (eta, variance, ...) and the grid's (offset, rho, final, ...: grids.make).

    Tables of as many rows are one compiled program, whatever the solver (those that need more than MEMORY
    predictions, plms and pndm, apart).

    >>> print(make("dpmpp_2m", schedules.make("cosine"), steps=20))
    """
    known: dict[str, Callable[..., Table | Solver]] = {**SOLVERS, **METHODS}
    solver = known[choose("solver", name, known)]
    grid_options = {k: options.pop(k) for k in GRID_OPTIONS if k in options}
    check_options(f"solver {name!r}", solver, options, positional=1)
    check_options("the grid", grids.make, grid_options, positional=3)
    if isinstance(grid, Grid):
        if grid_options:
            raise UserError(f"{', '.join(grid_options)}: these belong to making a grid, and one was given")
    else:
        grid = grids.make(schedule, steps, grid, **grid_options)
    made = solver(grid, **options)
    return made.with_memory(max(MEMORY, made.used_memory)) if isinstance(made, Table) else made


def __getattr__(name: str):
    if name in ("endpoints", "optimize"):  # only those who learn a solver pay for importing optax
        return getattr(importlib.import_module("jax_diffusion.solvers.learned"), name)
    raise AttributeError(f"module 'jax_diffusion.solvers' has no attribute {name!r}")
