"""Exact likelihoods by the probability-flow ODE (Song et al. 2021, section 4.3 and appendix D.2).

The ODE carries data to the prior, and the density along with it. In the frame of solvers/frame.py it is
dy/dw = y - D with w = log u, so in d dimensions, by the instantaneous change of variables (Chen et al. 2018, eq. 8),

    log p(y_min) = log p(y_max) + d (w_max - w_min) - int_{w_min}^{w_max} tr(dD/dy) dw    (1)

which is eq. 39 of Song et al. with the part of the divergence that is known taken out of the integral. The model
draws x_0 as x / alpha at the least noise; y = x / s on both ends adds d log(alpha_min / s_min) and d log s_max.
The trace is exact (d evaluations) or Skilling-Hutchinson's unbiased v^T (dD/dy) v, E[v v^T] = I (eq. 40).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_diffusion.errors import UserError, choose
from jax_diffusion.guidance import Denoiser
from jax_diffusion.lowering import differentiable_forward
from jax_diffusion.posterior import LOG_2PI
from jax_diffusion.shapes import mean_per_sample, per_sample
from jax_diffusion.solvers import noise
from jax_diffusion.solvers.runge_kutta import RungeKutta, integrate

BIN = 1 / 127.5  # the distance of two 8-bit grey levels in [-1, 1]
DIVERGENCES = ("rademacher", "gaussian", "exact")
DERIVATIVES = ("forward", "reverse")


class Likelihood(NamedTuple):
    log_prob: jax.Array  # [B] log density of x_0, in nats, all dimensions together
    latents: jax.Array  # [B, ...] x at the first time
    evaluations: jax.Array  # [B] of the denoiser and its derivative


def log_likelihood(
    key: jax.Array,
    denoise: Denoiser,
    solver: RungeKutta,
    x0: jax.Array,
    *,
    divergence: str = "rademacher",
    steps: int | None = None,
    derivative: str = "forward",
    indices: jax.Array | None = None,
) -> Likelihood:
    """The log density that the probability-flow ODE of a denoiser gives to x0.

    Args:
      key:        of the trace estimate; sample i's depends on it and on its index alone.
      denoise:    unclipped: a clipped D has another flow, and kinks that stop the step control.
      solver:     solvers.make("rk45", schedule, ...): the times, the tolerances and the prior.
      x0:         [B, ...] continuous; 8-bit images through `dequantize`.
      divergence: "rademacher" or "gaussian" estimates (the former's variance is the lower), or "exact", at d
                  derivatives per evaluation, for few dimensions.
      steps:      None is the solver's adaptive steps; N is N steps of Heun's, uniform in log u: one scan.
      derivative: "forward" (jvp) or "reverse" (vjp, where a layer has no forward rule; exact is always forward).
                  On a small U-Net on the CPU they cost 2.2 and 2.8 plain evaluations, the evaluation included.
      indices:    [B] numbers of the samples; None is 0..B-1.

    log_prob is NaN where the solver gave up. Its error is that of the integral (the tolerances are per dimension) and,
    of an estimate, its standard deviation: average over keys, or over data.
    """
    choose("divergence", divergence, DIVERGENCES)
    choose("derivative", derivative, DERIVATIVES)
    if steps is not None and steps < 1:
        raise UserError(f"steps={steps} of Heun's is too few: give at least 1, or None for adaptive ones")
    indices = jnp.arange(len(x0)) if indices is None else jnp.asarray(indices)
    slope = _slope(denoise, solver, divergence, derivative, noise.sample_keys(key, indices), x0)
    start, end = (jnp.asarray(w, jnp.float32) for w in (solver.end, solver.start))  # from data to noise
    (_, s_min), (_, s_max) = solver.frame.point(start), solver.frame.point(end)
    ratio = jnp.asarray(solver.alpha_end, jnp.float32) / s_min
    state = x0.astype(jnp.float32) * per_sample(ratio, x0), jnp.zeros(len(x0))
    if steps is None:
        (y, trace), used = integrate(slope, state, start, end, solver.pair, solver.control)
    else:
        (y, trace), used = _heun(slope, state, start, end, steps)
    latents = y * per_sample(s_max, y)
    z = latents / jnp.asarray(solver.scale, jnp.float32)
    log_scale = jnp.log(jnp.asarray(solver.scale, jnp.float32))
    # Per dimension, so that no two large numbers cancel.
    prior = -0.5 * (mean_per_sample(jnp.square(z)) + LOG_2PI) - log_scale
    per_dim = prior + (end - start) - trace + jnp.log(s_max) + jnp.log(ratio)
    return Likelihood(per_dim * math.prod(x0.shape[1:]), latents, used)


def _slope(denoise, solver, divergence, derivative, keys, x0):
    """(y, trace / d), w -> their derivatives."""
    shape = x0.shape[1:]
    size = math.prod(shape)
    if divergence == "rademacher":
        v = jax.vmap(lambda k: jax.random.rademacher(k, shape, jnp.float32))(keys)
    elif divergence == "gaussian":
        v = noise.normal(keys, 0, shape)

    def slope(state, w):
        y, _ = state

        def D(y):
            with differentiable_forward():
                return solver.frame.denoised(denoise, y, w).astype(jnp.float32)

        if divergence == "exact":
            d, push = jax.linearize(D, y)
            basis = jnp.eye(size).reshape(size, 1, *shape)
            # Column i of every sample's Jacobian at once: samples do not depend on one another.
            columns = jax.vmap(lambda e: push(jnp.broadcast_to(e, y.shape)) * e)(basis)
            trace = jnp.sum(columns.reshape(size, len(y), size), axis=(0, 2)) / size
        elif derivative == "forward":
            d, Jv = jax.jvp(D, (y,), (v,))
            trace = mean_per_sample(v * Jv)
        else:
            d, pull = jax.vjp(D, y)
            trace = mean_per_sample(v * pull(v)[0])
        return y - d, trace

    return slope


def _heun(slope, state, start, end, steps):
    """The trapezoid rule, steps of equal length in w."""
    batch = state[1].shape
    h = (end - start) / steps

    def step(state, n):
        def at(n):
            return jnp.broadcast_to(start + n * h, batch)

        def move(h, k):
            return jax.tree.map(lambda y, k: y + h * k, state, k)

        first = slope(state, at(n))
        second = slope(move(h, first), at(n + 1))
        return move(h / 2, jax.tree.map(jnp.add, first, second)), None

    state, _ = jax.lax.scan(step, state, jnp.arange(steps, dtype=jnp.float32))
    return state, jnp.full(batch, 2 * steps)


def dequantize(key: jax.Array, x0: jax.Array, indices: jax.Array | None = None) -> jax.Array:
    """Images on the 8-bit grid in [-1, 1], [B, ...], spread uniformly over their bins (Theis et al. 2016)."""
    indices = jnp.arange(len(x0)) if indices is None else jnp.asarray(indices)
    keys = noise.sample_keys(key, indices)
    return x0 + BIN * jax.vmap(lambda k: jax.random.uniform(k, x0.shape[1:], x0.dtype, -0.5, 0.5))(keys)


def bits_per_dim(log_prob: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Of dequantised 8-bit images of `shape` from their log density [B] in nats.

    Averaged over the dequantisation, -log2 p(x) - log2(bin) bounds -log2 P(image) from above (Theis et al. 2016).
    """
    return -log_prob / (math.prod(shape) * math.log(2)) - math.log2(BIN)
