"""DPM-Solver-12 and -23 with steps of each sample's own (Lu et al. 2022a, appendix C, "adaptive step size").

With h a step of log u in the straight frame y = x / s, and e = (y - D) / u the slope there (the noise prediction, where
the frame is EDM's), the exponential integrators of section 3 are, with u' = u e^-h and phi(h) = (1 - (1 + h) e^-h) / h,

    order 1    y' = y + (u' - u) e_0
    order 2    y' = y + (u' - u) (e_0 + (e_1 - e_0) / (2 r_1)),                  e_1 at r_1 h by order 1
    order 3    y' = y + (u' - u) e_0 - u phi(h) / r_2 (e_2 - e_0)                e_2 at r_2 h, likewise from e_0 and e_1

Two neighbouring orders share their evaluations, and their difference is the error of the lower one.
"""

import dataclasses

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

SAFETY = 0.9
# The paper sets no bounds. At high noise all slopes are nearly equal, and steps that grew at will would jump over the
# levels where the image is decided, with an error estimate of nearly zero.
LEAST_FACTOR, LARGEST_FACTOR = 0.2, 2.0
LARGEST_STEP = 1.0  # in log u


@dataclasses.dataclass(frozen=True, eq=False)
class DPMAdaptive(Adaptive):
    """A `Solver`; its numbers are data, its order is part of the program. Each sample pays the batch's slowest."""

    t: Array  # [1] the time it starts from
    start: Array  # [] w = log u there
    end: Array  # []
    rtol: Array  # []
    atol: Array  # []
    first_step: Array  # [] in log u
    max_evaluations: Array  # []
    lands: Array  # [] 1: a last evaluation goes on to sigma = 0
    scale: Array  # []
    C_start: Array  # []
    frame: Frame
    order: int
    name: str = ""

    def solve(self, keys: jax.Array, denoise: Denoiser, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(x_0 [B, ...], evaluations [B]) from x at the first time; NaN where max_evaluations were too few."""
        del keys  # no noise is drawn
        batch = x.shape[:1]
        end, rtol, atol, first, most = (
            jnp.asarray(c, x.dtype) for c in (self.end, self.rtol, self.atol, self.first_step, self.max_evaluations)
        )
        w = jnp.broadcast_to(jnp.asarray(self.start, x.dtype), batch)
        y = x / per_sample(self.frame.point(w)[1], x)

        def going(state):
            w, _, _, _, used = state
            return (w > end) & (used + self.order <= most)

        def attempt(state):
            w, y, lower_before, h, used = state
            active, last = going(state), h >= w - end
            h = jnp.minimum(h, w - end)
            lower, higher = _STEPS[self.order](self.frame, denoise, y, w, h)
            allowed = jnp.maximum(atol, rtol * jnp.maximum(jnp.abs(lower), jnp.abs(lower_before)))
            axes = tuple(range(1, y.ndim))
            error = jnp.sqrt(jnp.mean(jnp.square((lower - higher) / allowed), axis=axes))
            accept = active & (error <= 1)  # not where it is NaN
            factor = jnp.clip(SAFETY * error ** (-1 / self.order), LEAST_FACTOR, LARGEST_FACTOR)
            factor = jnp.where(jnp.isnan(error), LEAST_FACTOR, factor)
            take = per_sample(accept, y) > 0
            w = jnp.where(accept, jnp.where(last, end, w - h), w)
            return (
                w,
                jnp.where(take, higher, y),
                jnp.where(take, lower, lower_before),
                jnp.where(active, jnp.minimum(h * factor, LARGEST_STEP), h),
                used + active * self.order,
            )

        begin = (w, y, y, jnp.broadcast_to(first, batch), jnp.zeros(batch, x.dtype))
        w, y, _, _, used = jax.lax.while_loop(lambda s: jnp.any(going(s)), attempt, begin)
        y = jnp.where(per_sample(w <= end, y) > 0, y, jnp.nan)
        t, s = self.frame.point(end)
        state, lands = per_sample(s, y) * y, jnp.asarray(self.lands) > 0
        x = jax.lax.cond(lands, lambda x: unpack(denoise(x, t)).x0.astype(x.dtype), lambda x: x, state)
        return jnp.where(jnp.isnan(y), jnp.nan, x), used.astype(jnp.int32) + lands


jax.tree_util.register_dataclass(
    DPMAdaptive,
    ["t", "start", "end", "rtol", "atol", "first_step", "max_evaluations", "lands", "scale", "C_start"],
    meta_fields=["frame", "order"],
    drop_fields=["name"],
)


def _phi(h: jax.Array) -> jax.Array:
    """(1 - (1 + h) e^-h) / h = h/2 - h^2/3 + ..., by its series where the numerator cancels."""
    small = jnp.abs(h) < 0.1
    safe = jnp.where(small, 1.0, h)
    series = h / 2 - h**2 / 3 + h**3 / 8 - h**4 / 30 + h**5 / 144
    return jnp.where(small, series, (-jnp.expm1(-safe) - safe * jnp.exp(-safe)) / safe)


def _steps(frame, denoise, y, w, h):
    """What both orders are made of: u, the slope at a point, and u' - u of a part r of the step."""

    def slope(y, w):
        return (y - frame.denoised(denoise, y, w).astype(y.dtype)) / per_sample(jnp.exp(w), y)

    def move(r):
        return per_sample(jnp.exp(w) * jnp.expm1(-r * h), y)

    return slope, move


def _step_12(frame, denoise, y, w, h):
    """(order 1, order 2) of a step h [B] down from w [B], r_1 = 1/2."""
    slope, move = _steps(frame, denoise, y, w, h)
    e0 = slope(y, w)
    e1 = slope(y + move(1 / 2) * e0, w - h / 2)
    return y + move(1) * e0, y + move(1) * e1


def _step_23(frame, denoise, y, w, h):
    """(order 2, order 3), r_1 = 1/3 and r_2 = 2/3 (algorithm 2)."""
    slope, move = _steps(frame, denoise, y, w, h)
    r1, r2 = 1 / 3, 2 / 3
    e0 = slope(y, w)
    e1 = slope(y + move(r1) * e0, w - r1 * h)
    u = jnp.exp(w)
    second = y + move(r2) * e0 + per_sample(r2 / r1 * u * _phi(r2 * h), y) * (e0 - e1)
    e2 = slope(second, w - r2 * h)
    lower = y + move(1) * (e0 + (e1 - e0) / (2 * r1))
    return lower, y + move(1) * e0 + per_sample(u * _phi(h) / r2, y) * (e0 - e2)


_STEPS = {2: _step_12, 3: _step_23}


def dpm_adaptive(
    grid: Grid,
    order: int = 3,
    rtol: float = 0.05,
    atol: float = 0.0078,
    first_step: float = 0.05,
    max_evaluations: int = 1000,
) -> DPMAdaptive:
    """From the grid's first time to the schedule's least noise; `final` is the grid's, its other points are not used.

    order: 2 is DPM-Solver-12, 3 is DPM-Solver-23 (the higher of the pair goes on).  rtol, atol: of y = x / s; the
    defaults are the paper's for images (atol is one grey level).  first_step: in log u.
    max_evaluations: a sample that needs more is NaN.
    """
    if order not in _STEPS:
        raise UserError(f"order={order} of solver 'dpm_adaptive': use 2 (DPM-Solver-12) or 3 (DPM-Solver-23)")
    for name, value in (("rtol", rtol), ("atol", atol), ("first_step", first_step)):
        if not value > 0:
            raise UserError(f"{name}={value:g} of solver 'dpm_adaptive' must be above 0")
    if max_evaluations < 10:
        raise UserError(f"max_evaluations={max_evaluations} is too few for one step: give at least 10")
    frame = Frame.of(grid.schedule)
    return DPMAdaptive(
        t=np.array(grid.t[:1], np.float64),
        start=np.float64(frame.w(grid.t[0])),
        end=np.float64(frame.w(frame.last_time)),
        rtol=np.float64(rtol),
        atol=np.float64(atol),
        first_step=np.float64(first_step),
        max_evaluations=np.float64(max_evaluations),
        lands=np.float64(grid.sigma[-1] == 0),
        scale=np.float64(grid.prior_scale),
        C_start=np.float64(0.0),
        frame=frame,
        order=order,
        name=f"dpm_adaptive(order={order}, rtol={rtol:g}, atol={atol:g})",
    )
