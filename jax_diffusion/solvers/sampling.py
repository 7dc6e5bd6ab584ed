"""`sample`: noise in, samples out, by any solver."""

import abc
from collections.abc import Sized
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jax_diffusion.errors import UserError
from jax_diffusion.guidance import Denoiser, Remembering
from jax_diffusion.solvers import noise
from jax_diffusion.solvers.table import Table


class Solver(Protocol):
    """What `sample` runs: a Table, or a method that is not linear (Langevin correctors, adaptive steps).

    A pytree of numbers, so that another setting is new data for the same compiled program.
    """

    @property
    def name(self) -> str: ...

    @property
    def scale(self) -> Any:
        """[] standard deviation of the initial noise."""

    @property
    def C_start(self) -> Any:
        """[] standard deviation of noise to be added to a state that is handed in."""

    def run(self, keys: jax.Array, denoise: Denoiser, x: jax.Array, trajectory: bool = False):
        """(x_0 [B, ...], every x0_hat [N, B, ...] or None) from x [B, ...]; keys [B], one a sample."""
        ...


class Adaptive(abc.ABC):
    """A Solver in which each sample takes steps of its own."""

    @abc.abstractmethod
    def solve(self, keys: jax.Array, denoise: Denoiser, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(x_0 [B, ...], evaluations [B]) from x [B, ...] at the first time."""

    def run(self, keys: jax.Array, denoise: Denoiser, x: jax.Array, trajectory: bool = False):
        """See Solver.run; there is no trajectory."""
        if trajectory:
            raise UserError(
                "trajectory=True: adaptive solvers take other steps for each sample; use one of fixed steps"
            )
        return self.solve(keys, denoise, x)[0], None


def cost(solver: Solver) -> str:
    """ "50 evaluations", or "adaptive steps" where each sample takes its own number."""
    return f"{len(solver)} evaluations" if isinstance(solver, Sized) else "adaptive steps"


def sample(
    key: jax.Array,
    denoise: Denoiser | Remembering,
    solver: Solver,
    shape: tuple[int, ...],
    *,
    indices: jax.Array | None = None,
    x: jax.Array | None = None,
    trajectory: bool = False,
):
    """Runs a solver: one compiled loop, the network traced once.

    Args:
      key:        decides all randomness, together with a sample's index.
      denoise:    (x_t [B, ...], t []) -> x0_hat [B, ...], or guidance.Denoised; for a table also one with a state,
                  guidance.Remembering.
      solver:     a table, see solvers.make.
      shape:      of one sample, for instance (32, 32, 3).
      indices:    [B] int, which samples of the seed to draw; None is number 0, or 0..B-1 where x is given.
      x:          [B, *shape] state to start from instead of noise (partial noising, inversion).
      trajectory: also return every x0_hat, [N, B, *shape]; costs that memory.

    Returns x_0 [B, *shape] float32, or (x_0, trajectory).
    """
    if isinstance(denoise, Remembering) and not isinstance(solver, Table):
        raise UserError(f"solver {solver.name!r} is no table of fixed rows: a cache needs one, like ddim or dpmpp_2m")
    indices = jnp.arange(1 if x is None else len(x)) if indices is None else jnp.asarray(indices)
    keys = noise.sample_keys(key, indices)
    if x is None:
        x = prior(keys, solver, shape)
    else:
        churn = jnp.asarray(solver.C_start, x.dtype)
        x = jax.lax.cond(
            churn > 0, lambda x: x + churn * noise.normal(keys, noise.ON_A_GIVEN_STATE, x.shape[1:]), lambda x: x, x
        )
    x, x0_hats = solver.run(keys, denoise, x, trajectory)  # type: ignore[arg-type]  # a Table takes both
    return (x, x0_hats) if trajectory else x


def prior(keys: jax.Array, solver: Solver, shape: tuple[int, ...]) -> jax.Array:
    """The noise that a solver starts from, [B, *shape]; keys [B]."""
    return jnp.asarray(solver.scale, jnp.float32) * noise.normal(keys, 0, tuple(shape))
