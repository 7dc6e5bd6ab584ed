"""Pixels between uint8 and float, and flips: pure functions for the inside of a jitted step.

Batches travel to the device as uint8, a quarter of the bytes, and become float32 there.
"""

import jax
import jax.numpy as jnp
import numpy as np


def to_float(images: jax.Array | np.ndarray) -> jax.Array:
    """uint8 [...] in 0..255 -> float32 [...] in [-1, 1] as x / 127.5 - 1; floats pass through unchanged."""
    if jnp.issubdtype(images.dtype, jnp.floating):
        return images  # type: ignore[return-value]  # NumPy's stay NumPy's
    # In this order it is odd about mid-grey and ends at 1: XLA makes 1.0000001 of 255 / 127.5 - 1.
    return (images.astype(jnp.float32) - 127.5) / 127.5  # type: ignore[return-value]


def to_uint8(x: jax.Array | np.ndarray) -> jax.Array:
    """float [...] in [-1, 1] -> uint8 [...] as round(127.5 (x + 1)), clipped: the inverse of to_float."""
    x = x.astype(jnp.float32)  # bfloat16 cannot count to 255
    return jnp.clip(jnp.round(127.5 * (x + 1.0)), 0, 255).astype(jnp.uint8)


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors each image of [B, H, W, C] left to right with probability 1/2, independently."""
    flip = jax.random.bernoulli(key, 0.5, (images.shape[0],))
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1, :], images)
