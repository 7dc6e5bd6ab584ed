"""Layers that preserve magnitude: where the input has unit variance, so has the output.

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models" (EDM2), section 2 and
appendix B. A weight counts by its direction alone, so the magnitude that is stored is free, and training keeps it
at one (`project`): else weights grow without end and the effective learning rate decays unseen.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_diffusion.models.layers import dot_rows

EPS = 1e-4  # added to the magnitude that is divided by


def normalize(x: jax.Array, axes: Sequence[int]) -> jax.Array:
    """x over its root mean square along `axes` (eq. 47, 66): unit magnitude, in x's type, statistics float32."""
    square = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=axes, keepdims=True)
    # The square root has no gradient at 0, where the EPS alone is divided by.
    positive = square > 0
    rms = jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)
    return x / (EPS + rms).astype(x.dtype)


def mp_silu(x: jax.Array) -> jax.Array:
    """SiLU over its root mean square for normal inputs (eq. 81)."""
    return jax.nn.silu(x) / 0.596


def mp_sum(a: jax.Array, b: jax.Array, balance: float) -> jax.Array:
    """(1 - balance) a + balance b with unit variance for independent a and b (eq. 88)."""
    return (a + balance * (b - a)) / math.hypot(1 - balance, balance)


def mp_concat(a: jax.Array, b: jax.Array, balance: float) -> jax.Array:
    """a and b side by side along the last axis, as (1 - balance) to balance whatever their widths (eq. 103)."""
    total = math.sqrt(a.shape[-1] + b.shape[-1]) / math.hypot(1 - balance, balance)
    wa, wb = (total * part / math.sqrt(z.shape[-1]) for part, z in ((1 - balance, a), (balance, b)))
    return jnp.concatenate([wa * a, wb * b], axis=-1)


class MPFourier(nnx.Module):
    """sqrt(2) cos(t f + p) with random f ~ N(0, (2 pi)^2) and p ~ U(0, 2 pi), never trained (eq. 75). [B] -> [B, F]."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        self.frequencies = nnx.Param(2 * jnp.pi * jax.random.normal(rngs.params(), (features,), jnp.float32))
        self.phases = nnx.Param(2 * jnp.pi * jax.random.uniform(rngs.params(), (features,), jnp.float32))

    def __call__(self, t: jax.Array) -> jax.Array:
        f, p = jax.lax.stop_gradient((self.frequencies[...], self.phases[...]))
        return math.sqrt(2) * jnp.cos(t.astype(jnp.float32)[:, None] * f[None] + p[None])


class MPConv(nnx.Module):
    """A convolution (or, of size 0, a matrix) without bias whose weights are used at unit magnitude over
    sqrt(fan in), times a gain (eq. 47). [..., I] -> [..., O].

    kernel: [size, size, I, O] or [I, O], normalised per output.
    """

    def __init__(self, cin: int, cout: int, size: int = 0, *, dtype=None, rngs: nnx.Rngs):
        shape = (size, size, cin, cout) if size else (cin, cout)
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), shape, jnp.float32))
        self.size, self.dtype = size, dtype or jnp.float32

    def __call__(self, x: jax.Array, gain: jax.Array | float = 1.0) -> jax.Array:
        w = unit_kernel(self.kernel[...])
        w = (w * (gain / math.sqrt(w.size // w.shape[-1]))).astype(self.dtype)
        x = x.astype(self.dtype)
        if not self.size:
            return dot_rows(x, w)
        pad = (self.size // 2, self.size // 2)
        return jax.lax.conv_general_dilated(x, w, (1, 1), (pad, pad), dimension_numbers=("NHWC", "HWIO", "NHWC"))


def unit_kernel(w: jax.Array) -> jax.Array:
    """An MPConv's kernel with unit magnitude for each output."""
    return normalize(w, tuple(range(w.ndim - 1)))


def project(params: Any) -> Any:
    """Forced weight normalisation (section 2.3, eq. 66): every MPConv's kernel brought back to unit magnitude.

    For networks whose every "kernel" is an MPConv's.
    """
    return jax.tree_util.tree_map_with_path(lambda path, p: unit_kernel(p) if path[-1].key == "kernel" else p, params)
