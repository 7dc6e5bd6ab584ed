"""Embedded Runge-Kutta pairs with steps of each sample's own: dy/dw = f(y, w) to a given tolerance.

    rk45   Dormand & Prince 1980, order 5 with an error estimate of order 4: six evaluations a step
    rk23   Bogacki & Shampine 1989, order 3 with one of order 2: three

Song et al. 2021 (section 4.3) sample and encode by rk45. Steps and errors are controlled per sample as in Hairer,
Norsett & Wanner (Solving Ordinary Differential Equations I, II.4), with SciPy's constants, so that a sample does not
depend on its batch. diffrax would do this under vmap, but a network wants its batch whole, and it is one dependency
more for the fifty lines of `integrate`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_diffusion.errors import UserError
from jax_diffusion.guidance import Denoiser, unpack
from jax_diffusion.schedules.base import Array
from jax_diffusion.shapes import per_sample
from jax_diffusion.solvers.frame import Frame
from jax_diffusion.solvers.sampling import Adaptive
from jax_diffusion.solvers.table import Grid

SAFETY, LEAST_FACTOR, LARGEST_FACTOR = 0.9, 0.2, 10.0
FINEST_RTOL = 1e-6  # float32 cannot tell apart what a finer one would have to


class Pair(NamedTuple):
    """The Butcher tableau of S stages, of which the next step's first is the last + 1; float64 as made."""

    A: Any  # [S + 1, S + 1]; the last row is the solution's weights
    C: Any  # [S + 1]
    E: Any  # [S + 1] weights of the error estimate
    exponent: Any  # [] 1 / (order of the estimate + 1)


@functools.cache
def pair_of(name: str) -> Pair:
    """SciPy's "rk45" or "rk23", whose coefficients it documents as attributes of a class."""
    from scipy import integrate  # a third of a second, which starts without an adaptive solver need not spend

    method = {"rk45": integrate.RK45, "rk23": integrate.RK23}[name]
    S = method.n_stages
    A = np.zeros((S + 1, S + 1))
    A[:S, : method.A.shape[1]] = method.A
    A[S, :S] = method.B
    return Pair(A, np.append(method.C, 1.0), method.E, np.float64(1 / (method.error_estimator_order + 1)))


class Control(NamedTuple):
    """What accuracy is asked for; numbers, which may be traced."""

    rtol: Any  # relative to |y|
    atol: Any  # in units of y
    first_step: Any  # in units of w
    max_evaluations: Any  # of each sample


def control(span: float, steps: int, rtol: float, atol: float, max_evaluations: int) -> Control:
    """A checked Control whose first step is span / steps, a tenth of the span at most: the error estimate of one step
    over all of it may be small by accident."""
    if not rtol >= FINEST_RTOL:
        raise UserError(f"rtol={rtol:g} is finer than float32 can meet: use at least {FINEST_RTOL:g}")
    if not atol > 0:
        raise UserError(f"atol={atol:g} must be above 0")
    if max_evaluations < 10:
        raise UserError(f"max_evaluations={max_evaluations} is too few for one step: give at least 10")
    return Control(
        np.float64(rtol), np.float64(atol), np.float64(abs(span) / max(steps, 10)), np.int32(max_evaluations)
    )


def integrate(
    slope: Callable[[Any, jax.Array], Any], y: Any, start: jax.Array, end: jax.Array, pair: Pair, control: Control
) -> tuple[Any, jax.Array]:
    """y at w = end from y at w = start, in either direction.

    Args:
      slope: (y, w [B]) -> dy/dw, of y's structure.
      y:     pytree of float arrays [B, ...]. The error of a sample is the largest of its leaves', each the root mean
             square over its elements of estimate / (atol + rtol |y|); at most 1 is accepted.
      start, end: [] or [B].

    Returns (y, evaluations int32 [B]). A sample that needed more than max_evaluations is NaN.
    """
    dtype = jax.tree.leaves(y)[0].dtype
    batch = jax.tree.leaves(y)[0].shape[:1]
    pair, (rtol, atol, first, most) = jax.tree.map(lambda c: jnp.asarray(c, dtype), (pair, control))
    stages = pair.A.shape[0] - 1
    w, end = (jnp.broadcast_to(jnp.asarray(c, dtype), batch) for c in (start, end))
    direction = jnp.sign(end - w)

    def combine(weights, slopes):
        # Not a dot: matrix units would round its inputs to bfloat16.
        return jax.tree.map(lambda k: jnp.sum(weights.reshape((-1,) + (1,) * (k.ndim - 1)) * k, axis=0), slopes)

    def add(y, h, change):
        return jax.tree.map(lambda y, c: y + per_sample(h, y) * c, y, change)

    def going(state):
        w, _, _, _, _, used = state
        return (w != end) & (used + stages <= most)

    def attempt(state):
        w, y, k, size, rejected, used = state
        active, left = going(state), jnp.abs(end - w)
        last = size >= left
        size = jnp.minimum(size, left)
        h = direction * size

        def stage(i, slopes):
            row, here = pair.A[i], jnp.where(last & (pair.C[i] == 1), end, w + pair.C[i] * h)
            new = slope(add(y, h, combine(row, slopes)), here)
            return jax.tree.map(lambda s, n: s.at[i].set(n), slopes, new)

        slopes = jax.tree.map(lambda k: jnp.zeros((stages + 1, *k.shape), k.dtype).at[0].set(k), k)
        slopes = jax.lax.fori_loop(1, stages + 1, stage, slopes)
        new = add(y, h, combine(pair.A[-1], slopes))
        error = _norm(combine(pair.E, slopes), y, new, size, rtol, atol)
        accept = active & (error <= 1)  # not where it is NaN
        factor = jnp.clip(SAFETY * error**-pair.exponent, LEAST_FACTOR, LARGEST_FACTOR)
        factor = jnp.where(jnp.isnan(error), LEAST_FACTOR, jnp.where(rejected, jnp.minimum(factor, 1), factor))

        def choose(new, old):
            return jax.tree.map(lambda n, o: jnp.where(per_sample(accept, n) > 0, n, o), new, old)

        k = choose(jax.tree.map(lambda s: s[-1], slopes), k)  # the last stage is at the new point
        moved = jnp.where(accept, jnp.where(last, end, w + h), w)
        size = jnp.where(active, size * factor, size)
        return moved, choose(new, y), k, size, active & ~accept, used + active * stages

    state = (w, y, slope(y, w), jnp.broadcast_to(first, batch), jnp.zeros(batch, bool), jnp.ones(batch, dtype))
    w, y, _, _, _, used = jax.lax.while_loop(lambda s: jnp.any(going(s)), attempt, state)
    y = jax.tree.map(lambda y: jnp.where(per_sample(w == end, y) > 0, y, jnp.nan), y)
    return y, used.astype(jnp.int32)


def _norm(error, old, new, h, rtol, atol) -> jax.Array:
    """The error of each sample in units of what is allowed, [B]."""

    def one(e, a, b):
        e = per_sample(h, e) * e / (atol + rtol * jnp.maximum(jnp.abs(a), jnp.abs(b)))
        return jnp.sqrt(jnp.mean(jnp.square(e), axis=tuple(range(1, e.ndim))))

    norms = jax.tree.leaves(jax.tree.map(one, error, old, new))
    return jnp.max(jnp.stack(norms), axis=0)


@dataclasses.dataclass(frozen=True, eq=False)
class RungeKutta(Adaptive):
    """The probability-flow ODE by an embedded pair, from the grid's first time down to the schedule's least noise.

    A `Solver` for `sample`, and both directions of the ODE by themselves. Tolerances are those of y = x / s
    (solvers/frame.py), in pixels where there is little noise. Each sample pays the time of the batch's slowest.
    """

    t: Array  # [1] the time it starts from
    start: Array  # [] w = log u there
    end: Array  # [] and where it ends
    pair: Pair
    control: Control
    lands: Array  # [] 1: a last evaluation at `end` goes on to sigma = 0; 0: x at the schedule's least noise
    alpha_end: Array  # []
    scale: Array  # []
    C_start: Array  # []
    frame: Frame
    name: str = ""

    def solve(self, keys: jax.Array, denoise: Denoiser, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(x_0 [B, ...], evaluations [B]) from x at the first time. keys: unused, the ODE draws no noise."""
        del keys
        y, used = self._integrate(denoise, x / per_sample(self._s(self.start), x), self.start, self.end)
        t, s = self.frame.point(jnp.asarray(self.end, jnp.float32))
        state = per_sample(s, y) * y
        lands = jnp.asarray(self.lands) > 0
        x = jax.lax.cond(lands, lambda x: unpack(denoise(x, t)).x0.astype(x.dtype), lambda x: x, state)
        return jnp.where(jnp.isnan(y), jnp.nan, x), used + lands

    def encode(self, denoise: Denoiser, x0: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(latents [B, ...], evaluations [B]): x_0 as alpha x_0 at the least noise, carried up to the first time."""
        ratio = jnp.asarray(self.alpha_end, x0.dtype) / self._s(self.end)
        y, used = self._integrate(denoise, x0 * per_sample(ratio, x0), self.end, self.start)
        return y * per_sample(self._s(self.start), y), used

    def decode(self, denoise: Denoiser, latents: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(x_0 [B, ...], evaluations [B]): the inverse of `encode`, up to the tolerance."""
        y = latents / per_sample(self._s(self.start), latents)
        y, used = self._integrate(denoise, y, self.start, self.end)
        return y * per_sample(self._s(self.end) / jnp.asarray(self.alpha_end, y.dtype), y), used

    def _s(self, w) -> jax.Array:
        return self.frame.point(jnp.asarray(w, jnp.float32))[1]

    def _integrate(self, denoise, y, start, end):
        def slope(y, w):
            return y - self.frame.denoised(denoise, y, w).astype(y.dtype)

        return integrate(slope, y, start, end, self.pair, self.control)


jax.tree_util.register_dataclass(
    RungeKutta,
    ["t", "start", "end", "pair", "control", "lands", "alpha_end", "scale", "C_start"],
    meta_fields=["frame"],
    drop_fields=["name"],
)


def _solver(name: str, grid: Grid, rtol: float, atol: float, max_evaluations: int) -> RungeKutta:
    frame = Frame.of(grid.schedule)
    last = frame.last_time
    start, end = frame.w(grid.t[0]), frame.w(last)
    return RungeKutta(
        t=np.array(grid.t[:1], np.float64),
        start=np.float64(start),
        end=np.float64(end),
        pair=pair_of(name),
        control=control(start - end, len(grid.t), rtol, atol, max_evaluations),
        lands=np.float64(grid.sigma[-1] == 0),
        alpha_end=np.float64(grid.schedule.alpha(np.float64(last))),
        scale=np.float64(grid.prior_scale),
        C_start=np.float64(0.0),
        frame=frame,
        name=f"{name}(rtol={rtol:g}, atol={atol:g})",
    )


def rk45(grid: Grid, rtol: float = 1e-4, atol: float = 1e-4, max_evaluations: int = 2000) -> RungeKutta:
    """Dormand-Prince. Of the grid it takes the first time, the first step (the range of log u / steps) and `final`.

    rtol, atol: of y, at least 1e-6 and above 0.  max_evaluations: a sample that needs more is NaN.
    """
    return _solver("rk45", grid, rtol, atol, max_evaluations)


def rk23(grid: Grid, rtol: float = 1e-3, atol: float = 1e-3, max_evaluations: int = 2000) -> RungeKutta:
    """Bogacki-Shampine, for low accuracy; otherwise as rk45."""
    return _solver("rk23", grid, rtol, atol, max_evaluations)
