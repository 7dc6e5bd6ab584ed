"""Learned solvers: a table's numbers improved by gradient descent.

With few evaluations no formula is best for a given network. A table is data, and sampling is differentiable in it, so
its coefficients and times are fitted to what many small steps make of the same noise:

    minimise over (A, B, t)   E_x |x_0(x; A, B, t) - x_0^ref(x)|^2

as in Watson et al. 2022 (Learning fast samplers for diffusion models by differentiating through sample quality),
whose objective is a kernel distance instead, and Tong et al. 2024 (LD3: Learning to discretize denoising diffusion
ODEs), who learn the times alone. The network stays as it is; a few dozen numbers are learned from a few dozen noises.

    x = table.scale * jax.random.normal(key, (48, 28, 28, 1))
    target = endpoints(make("dpmpp_3m", schedule, 100), denoiser, x)
    learned = optimize(make("unipc", schedule, 6), denoiser, x, target, schedule)
    learned.save("six.npz")
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_diffusion.errors import UserError
from jax_diffusion.guidance import Denoiser
from jax_diffusion.schedules.base import Schedule
from jax_diffusion.solvers.sampling import Solver
from jax_diffusion.solvers.table import Table

MakeDenoiser = Callable[[Any, Any], Denoiser]  # (params, cond) -> Denoiser
FARTHEST = 20.0  # flows have infinite log SNR at their ends


class Deltas(NamedTuple):
    """What is learned; all zeros are the table one began with."""

    A: jax.Array  # [N]
    B: jax.Array  # [N, K]
    time: jax.Array  # [N - 1] of the logarithm of each step in log SNR


def _zeros(table: Table) -> Deltas:
    n = len(table)
    return Deltas(jnp.zeros(n), jnp.zeros((n, table.memory)), jnp.zeros(n - 1))


def _moved(table: Table, deltas: Deltas, schedule: Schedule) -> Table:
    """The table with its deltas. The first time stays, and so does the last A: 0 where it lands on sigma = 0.

    Steps in log SNR keep their sign, so that times stay in order, and never leave the schedule.
    """
    low, high = (float(schedule.log_snr(np.float64(t))) for t in (schedule.t_max, schedule.t_min))
    low, high = max(low, -FARTHEST), min(high, FARTHEST)
    l = jnp.clip(schedule.log_snr(table.t), low, high)
    steps = jnp.diff(l)

    def times(steps):
        return schedule.inverse(jnp.clip(l[0] + jnp.pad(jnp.cumsum(steps), (1, 0)), low, high))

    # As a difference, so that without deltas the times are the given ones and not what rounding makes of them.
    t = table.t + (times(steps * jnp.exp(deltas.time)) - times(steps))
    # In units of the state's size, which is 80 at the start of EDM's schedule and 1 at its end.
    alpha, sigma = schedule.alpha_sigma(table.t)
    size = jnp.append(jnp.sqrt(alpha**2 + sigma**2), 1.0)
    A = table.A + (deltas.A * size[1:] / size[:-1]).at[-1].set(0.0)
    return dataclasses.replace(
        table, t=jnp.clip(t, schedule.t_min, schedule.t_max), A=A, B=table.B + deltas.B * size[1:, None]
    )


def _run(table: Table, denoise: Denoiser, x: jax.Array) -> jax.Array:
    """x_0 of a deterministic table, with memory for one row's activations in the backward pass."""
    # Gradients of convolutions inside a loop take 4 to 6 times longer on a CPU (measured, 6 rows of an MNIST U-Net).
    unroll = len(table) if jax.default_backend() == "cpu" else 1
    return table.run(None, denoise, x, remat=True, unroll=unroll)[0]


@functools.partial(jax.jit, static_argnames=("denoiser", "schedule"))
def _update(deltas, moments, rate, table, params, x, cond, target, *, denoiser, schedule):
    """One step of Adam: the new (deltas, moments) and the loss before it."""

    def loss(deltas):
        x_0 = _run(_moved(table, deltas, schedule), denoiser(params, cond), x)
        return jnp.mean(jnp.square(x_0 - target))

    value, gradient = jax.value_and_grad(loss)(deltas)
    updates, moments = _adam.update(gradient, moments)
    return jax.tree.map(lambda d, u: d - rate * u, deltas, updates), moments, value


_adam = optax.scale_by_adam(b1=0.9, b2=0.99)


@functools.partial(jax.jit, static_argnames=("denoiser",))
def _endpoint(table, params, x, cond, *, denoiser):
    return table.run(None, denoiser(params, cond), x)[0]


def deterministic(solver: Solver) -> Table:
    """The solver itself; UserError for a table with noise, and for a solver that is no table."""
    if not isinstance(solver, Table):
        raise UserError(f"solver {solver.name!r} is no table of numbers: use one that is, like ddim, dpmpp_2m or unipc")
    if np.any(solver.C):
        raise UserError(f"solver {solver.name!r} adds noise: only deterministic ones have one end point to compare")
    return solver


def _rows(tree: Any, rows: np.ndarray) -> Any:
    return jax.tree.map(lambda a: a[rows], tree)


def endpoints(
    table: Table,
    denoiser: MakeDenoiser,
    x: Any,
    *,
    params: Any = None,
    cond: Any = None,
    batch_size: int = 64,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """x_0 [M, ...] of a deterministic table from the states x [M, ...]; arguments as for optimize."""
    deterministic(table)
    x = np.asarray(x, np.float32)
    cond = jax.tree.map(np.asarray, cond)
    size, out = min(batch_size, len(x)), []
    for begin in range(0, len(x), size):
        # The last call is filled up: one shape, one program.
        rows = np.minimum(np.arange(begin, begin + size), len(x) - 1)
        x_0 = _endpoint(table, params, x[rows], _rows(cond, rows), denoiser=denoiser)
        out.append(np.asarray(x_0)[: len(x) - begin])
        progress(min(begin + size, len(x)), len(x))
    return np.concatenate(out)


def optimize(
    table: Table,
    denoiser: MakeDenoiser,
    x: Any,
    target: Any,
    schedule: Schedule,
    *,
    params: Any = None,
    cond: Any = None,
    iterations: int = 200,
    learning_rate: float = 0.02,
    batch_size: int = 8,
    seed: int = 0,
    progress: Callable[[int, float], None] = lambda done, loss: None,
) -> Table:
    """The table with coefficients and times that lead from x nearest to `target`. Float64, of the same shape.

    Args:
      table:         deterministic, where to begin; table.with_memory(K) lets every row use K predictions.
      denoiser:      (params, cond) -> Denoiser, the same object in every call to be compiled once; guidance and
                     clipping belong into it. For a plain one, `lambda params, cond: denoise`.
      x:             [M, ...] states at the table's first time, noise of standard deviation table.scale.
      target:        [M, ...] where they should arrive: `endpoints` of a table of many rows.
      schedule:      of the denoiser; discrete ones too, whose network is then asked at fractional times.
      params:        what all noises share, handed to `denoiser` as traced values.
      cond:          pytree of [M, ...] arrays, or None: what each noise has of its own.
      iterations:    steps of Adam, the rate falling to 0 as a cosine.
      learning_rate: 0.02 moves a coefficient by at most that times the state's size in a step.
      batch_size:    noises per step.
      progress:      called as progress(steps done, loss: squared distance per element).

    Raises UserError for tables with noise.
    """
    deterministic(table)
    x, target = np.asarray(x, np.float32), np.asarray(target, np.float32)
    cond = jax.tree.map(np.asarray, cond)
    if x.shape != target.shape or len(table) < 2:
        raise UserError(
            f"optimize: x {x.shape} and target {target.shape} must agree, and the table have 2 rows or more"
        )
    single = jax.tree.map(lambda c: jnp.asarray(c, jnp.float32), table)
    deltas = _zeros(table)
    moments = _adam.init(deltas)
    random = np.random.default_rng(seed)
    size, order = min(batch_size, len(x)), np.zeros(0, int)
    for i in range(iterations):
        if len(order) < size:
            order = random.permutation(len(x))
        rows, order = order[:size], order[size:]
        rate = np.float32(learning_rate * (1 + np.cos(np.pi * i / iterations)) / 2)
        deltas, moments, loss = _update(
            deltas, moments, rate, single, params, x[rows], _rows(cond, rows), target[rows],
            denoiser=denoiser, schedule=schedule,
        )  # fmt: skip
        progress(i + 1, float(loss))
    moved = _moved(single, deltas, schedule)
    # What was learned is added to the given numbers, whose float64 digits stay.
    learned = {
        name: getattr(table, name) + np.asarray(getattr(moved, name) - getattr(single, name), np.float64)
        for name in ("t", "A", "B")
    }
    return dataclasses.replace(table, **learned, name=f"learned from {table.name}" if iterations else table.name)
