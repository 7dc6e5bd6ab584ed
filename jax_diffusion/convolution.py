"""Convolutions by the fastest implementation of the platform that a program is compiled for."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jax_diffusion import onednn
from jax_diffusion.onednn import operations

NHWC = operations.NHWC


def convolve(x: jax.Array, kernel: jax.Array, strides, padding, **options) -> jax.Array:
    """lax.conv_general_dilated of [B, H, W, C] and [h, w, C, D], in the form that nnx.Conv calls.

    By oneDNN where there is one; strides, other types and small ones are XLA's.
    """
    if not _takes(x, kernel, strides, padding, options):
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
    (top, bottom), (left, right) = padding
    return operations.convolution(x, kernel, ((int(top), int(bottom)), (int(left), int(right))))


def _takes(x, kernel, strides, padding, options) -> bool:
    changed = {k: v for k, v in options.items() if v is not None and k != "dimension_numbers"}
    return (
        not isinstance(padding, str)
        and x.ndim == kernel.ndim == 4
        and x.dtype == kernel.dtype == jnp.float32
        and 2 * math.prod(x.shape[:3]) * kernel.size >= min(operations.LEAST.values())
        and all(high < size and low < size for (low, high), size in zip(padding, kernel.shape, strict=False))
        and tuple(strides) == (1, 1)
        and all(np.all(np.asarray(v) == 1) for v in changed.values())
        and onednn.taken()
    )
