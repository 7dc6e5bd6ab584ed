"""Shapes: one number per sample against an array per sample."""

import jax
import jax.numpy as jnp


def per_sample(c: jax.Array | float, x: jax.Array) -> jax.Array:
    """`c` ([] or [B]) as [B, 1, ..., 1] against `x` ([B, ...]): ranks are never promoted silently here."""
    c = jnp.asarray(c, x.dtype)
    return c.reshape(c.shape[:1] + (1,) * (x.ndim - 1)) if c.ndim else c.reshape((1,) * x.ndim)


def mean_per_sample(x: jax.Array) -> jax.Array:
    """The mean over all axes but the first, in float32: [B, ...] -> [B]."""
    return jnp.mean(x.astype(jnp.float32), axis=tuple(range(1, x.ndim)))
