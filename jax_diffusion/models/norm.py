"""GroupNorm, and what follows it in a residual block, written for the memory bandwidth that they cost.

A norm is an affine map of each channel, y = a x + b, whose a and b come from the sums of x and x^2 (Wu & He 2018,
section 3). Seen so, an added embedding or a scale and shift is only another a and b: no array as large as x is made
for it, and none but x is kept for the norm's gradient.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jax_diffusion.lowering import target


class GroupNorm(nnx.Module):
    """GroupNorm over all axes between the first and the last, in float32. [B, ..., C] -> [B, ..., C] float32."""

    def __init__(self, channels: int, groups: int, eps: float):
        self.scale = nnx.Param(jnp.ones((channels,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((channels,), jnp.float32))
        self.groups, self.eps = groups, eps

    def affine(self, x: jax.Array, offset: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """a, b [B, C] float32, so that a x + b is the norm of x + offset; x is read once. offset: [B, C]."""
        batch, channels = x.shape[0], x.shape[-1]
        positions, axes = math.prod(x.shape[1:-1]), tuple(range(1, x.ndim - 1))
        x = x.astype(jnp.float32)
        total, squares = x.sum(axes), jnp.square(x).sum(axes)
        if offset is not None:
            squares = squares + offset * (2 * total + positions * offset)
            total = total + positions * offset

        def mean_of_group(sums):
            means = sums.reshape(batch, self.groups, -1).mean(-1, keepdims=True) / positions
            return jnp.broadcast_to(means, (batch, self.groups, channels // self.groups)).reshape(batch, channels)

        mean = mean_of_group(total)
        variance = jnp.maximum(mean_of_group(squares) - jnp.square(mean), 0)
        a = jax.lax.rsqrt(variance + self.eps) * self.scale[...][None]
        return a, self.bias[...][None] + a * (-mean if offset is None else offset - mean)

    def __call__(self, x: jax.Array) -> jax.Array:
        return _apply(x, *self.affine(x))


def _apply(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    if target() == "tpu":
        x = _own_gradient(x)
    a, b = (v.reshape(v.shape[0], *(1,) * (x.ndim - 2), v.shape[-1]) for v in (a, b))
    return x.astype(jnp.float32) * a + b


def activate(
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.silu,
    *,
    rate: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """activation(a x + b) in x's type, with dropout at `rate` where there is a key.

    On CPUs the backward pass computes it again from x, which costs less than the memory it would be kept in. On TPU and
    GPU XLA's fusions do so where it pays: asked for, it cost a residual block 12 % of its cycles on v5e.
    """

    def run(x, a, b, keep):
        y = activation(_apply(x, a, b))
        return (y if keep is None else _dropped(y, keep, rate)).astype(x.dtype)

    keep = None if key is None or rate == 0 else kept(key, rate, x.shape)
    return (jax.checkpoint(run) if target() == "cpu" else run)(x, a, b, keep)


@jax.custom_jvp
def _own_gradient(x: jax.Array) -> jax.Array:
    """x, whose gradient is rounded to x's type and stored before others are added to it.

    On TPU the convolution that makes this gradient also sums it, for a and b, and writes it down for the pass that adds
    what follows from the sums. Left alone XLA writes it in float32.
    """
    return x


@_own_gradient.defjvp
def _(primals, tangents):
    return primals[0], jax.lax.optimization_barrier(tangents[0])


WORDS = 65536  # of sixteen bits


def _limit(rate: float) -> int:
    """How many of the WORDS stand for being kept."""
    return round((1 - rate) * WORDS)


def kept_share(rate: float) -> float:
    """The probability of being kept, in whole 65,536ths."""
    return _limit(rate) / WORDS


def _dropped(x: jax.Array, keep: jax.Array, rate: float) -> jax.Array:
    return jnp.where(keep, x / kept_share(rate), 0)


def kept(key: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """Which elements dropout keeps, bool of `shape`, each with probability kept_share(rate).

    Sixteen random bits an element: JAX draws 32 for each, and that is a tenth of a small block's time.
    """
    # A word's halves lie half an array apart, not beside each other: to interleave them takes a TPU longer than to
    # draw them. Along the axis after the batch, which is the one that devices share.
    axis = min(1, len(shape) - 1)
    half = -(-shape[axis] // 2)
    words = jax.random.bits(key, (*shape[:axis], half, *shape[axis + 1 :]), jnp.uint32)
    halves = words.astype(jnp.uint16), (words >> 16).astype(jnp.uint16)
    bits = jax.lax.slice_in_dim(jnp.concatenate(halves, axis), 0, shape[axis], axis=axis)
    return jnp.ones(shape, bool) if _limit(rate) == WORDS else bits < jnp.uint16(_limit(rate))


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Inverted dropout (Srivastava et al. 2014); key None switches it off."""
    if key is None or rate == 0:
        return x
    return _dropped(x, kept(key, rate, x.shape), rate).astype(x.dtype)
