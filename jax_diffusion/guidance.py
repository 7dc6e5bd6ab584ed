"""Denoisers, and functions from denoisers to denoisers.

A denoiser is `denoise(x_t, t) -> x0_hat`: x_t [B, ...], t [] or [B]. What it is conditioned on is already
inside. Where the model has learned its variance it returns (x0_hat, v) instead, v in [0, 1] of x's shape.
Guidance mixes x0_hats; since x0_hat is linear in the prediction, that equals mixing predictions of any type.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_diffusion.process import Gaussian
from jax_diffusion.shapes import per_sample

Denoised = jax.Array | tuple[jax.Array, jax.Array]
Denoiser = Callable[[jax.Array, jax.Array], Denoised]
Conditional = Callable[[jax.Array, jax.Array, Any], Denoised]  # (x_t, t, cond) -> x0_hat


def model_denoiser(process: Gaussian, apply: Callable, params: Any) -> Conditional:
    """`(x_t, t, cond) -> x0_hat` of a network. apply(params, x, c_noise, cond) -> prediction."""

    def denoise(x_t, t, cond):
        inputs, c_noise = process.network_inputs(x_t, t)
        prediction = apply(params, inputs, c_noise, cond).astype(jnp.float32)
        x0_hat, (_, v) = process.denoised(prediction, x_t, t), process.split(prediction)
        return x0_hat if v is None else (x0_hat, v)

    return denoise


def condition(denoise: Conditional, cond: Any) -> Denoiser:
    """The denoiser at a fixed condition: no guidance."""
    return lambda x, t: denoise(x, t, cond)


def classifier_free(denoise: Conditional, cond: Any, null: Any, scale: jax.Array | float) -> Denoiser:
    """null + scale (cond - null) from one forward pass of 2B (Ho & Salimans 2022, eq. 6 with scale = 1 + w).

    scale: 1 is no guidance, 0 is unconditional; a number or one per sample [B]; may be traced.
    cond, null: pytrees of [B, ...] arrays of equal shapes.
    """

    def guided(x, t):
        both = jax.tree.map(lambda c, n: jnp.concatenate([c, n]), cond, null)
        t2 = jnp.concatenate([t, t]) if jnp.ndim(t) else t
        out = denoise(jnp.concatenate([x, x]), t2, both)
        out, v = out if isinstance(out, tuple) else (out, None)
        with_cond, without = jnp.split(out, 2)
        mixed = without + per_sample(scale, x) * (with_cond - without)
        return mixed if v is None else (mixed, jnp.split(v, 2)[0])

    return guided


def _on_x0(denoise: Denoiser, f: Callable[[jax.Array], jax.Array]) -> Denoiser:
    def wrapped(x, t):
        out = denoise(x, t)
        return (f(out[0]), out[1]) if isinstance(out, tuple) else f(out)

    return wrapped


def clip(denoise: Denoiser, bound: float = 1.0) -> Denoiser:
    """x0_hat clipped to [-bound, bound]. Solvers re-derive the noise from the clipped x0_hat, as DDPM's and
    guided-diffusion's code does (diffusers: use_clipped_model_output=True). Never for latents."""
    return _on_x0(denoise, lambda x0: jnp.clip(x0, -bound, bound))


def dynamic_threshold(denoise: Denoiser, percentile: float = 99.5, minimum: float = 1.0) -> Denoiser:
    """x0_hat clipped to its own percentile s >= minimum and divided by s (Saharia et al. 2022, section 2.3)."""

    def threshold(x0):
        s = jnp.percentile(jnp.abs(x0).reshape(x0.shape[0], -1), percentile, axis=1)
        s = per_sample(jnp.maximum(s, minimum), x0)
        return jnp.clip(x0, -s, s) / s

    return _on_x0(denoise, threshold)
