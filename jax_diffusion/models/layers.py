"""Layers shared by the networks. Parameters and statistics are float32; `dtype` is what matmuls run in."""

import math
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_diffusion import lowering
from jax_diffusion.attention import attention, project_qkv
from jax_diffusion.convolution import NHWC, convolve
from jax_diffusion.models.norm import GroupNorm
from jax_diffusion.onednn import operations


def zeros_init():
    return nnx.initializers.zeros_init()


def sinusoidal_embedding(
    t: jax.Array,
    features: int,
    max_period: float = 10_000.0,
    *,
    shift: float = 0.0,
    sine_first: bool = False,
) -> jax.Array:
    """[cos, sin] of t at `features/2` geometric frequencies from 1 to 1/max_period: [B] -> [B, features].

    Vaswani et al. 2017 with DDPM's conventions as guided-diffusion orders them (cosine first).

    shift: 0 leaves 1/max_period just out; with 1, as in DDPM's own code, it is the last frequency.
    """
    half = features // 2
    # With PyTorch's roundings, which published networks know: XLA's exp is 1e-6 off, and t goes to 1000.
    exponent = np.float32(-math.log(max_period)) * np.arange(half, dtype=np.float32) / np.float32(half - shift)
    freqs = np.exp(exponent.astype(np.float64)).astype(np.float32)
    angle = t.astype(jnp.float32)[:, None] * freqs[None]
    return jnp.pad(_waves(angle, sine_first), ((0, 0), (0, features % 2)))


def _waves(angle: jax.Array, sine_first: bool) -> jax.Array:
    waves = jnp.sin(angle), jnp.cos(angle)
    return jnp.concatenate(waves if sine_first else waves[::-1], axis=-1)


class FourierEmbedding(nnx.Module):
    """[cos, sin] of 2 pi t w, w ~ N(0, scale^2) fixed at initialisation (Song et al. 2021, app. C; EDM).

    The frequencies are stored with the parameters, so that they are saved, but are never trained.
    """

    def __init__(self, features: int, scale: float = 16.0, *, sine_first: bool = False, rngs: nnx.Rngs):
        self.frequencies = nnx.Param(scale * jax.random.normal(rngs.params(), (features // 2,), jnp.float32))
        self.sine_first = sine_first

    def __call__(self, t: jax.Array) -> jax.Array:
        w = jax.lax.stop_gradient(self.frequencies[...])
        angle = t.astype(jnp.float32)[:, None] * w[None] * 2 * jnp.pi
        return _waves(angle, self.sine_first)


def group_count(channels: int, groups: int = 0) -> int:
    """How many groups group_norm makes of `channels`."""
    return math.gcd(groups or min(32, max(channels // 4, 1)), channels)


def group_norm(channels: int, *, groups: int = 0, eps: float = 1e-5) -> GroupNorm:
    """GroupNorm with as many groups as divide the channels, up to `groups`.

    groups: 0 is 32, fewer where a group would have less than 4 channels (EDM's rule). In a group of one channel
        the norm takes away whatever was added to the whole channel: an added time embedding is lost.
    """
    return GroupNorm(channels, group_count(channels, groups), eps)


def conv(cin, cout, size=3, *, stride=1, padding=None, zero=False, dtype=None, rngs) -> nnx.Conv:
    """A square convolution, NHWC, padded to keep the size (or by `padding` on each side's (low, high))."""
    pad = (size // 2, size // 2) if padding is None else padding
    init = {"kernel_init": zeros_init()} if zero else {}
    return nnx.Conv(
        cin,
        cout,
        (size, size),
        strides=(stride, stride),
        padding=(pad, pad),
        dtype=dtype,
        param_dtype=jnp.float32,
        conv_general_dilated=convolve,
        rngs=rngs,
        **init,
    )


def dense(cin, cout, *, zero=False, init=None, bias=True, dtype=None, rngs) -> nnx.Linear:
    """A matrix in `dtype` with float32 parameters, the weights that `init` draws (else Flax's) and a zero bias.
    [..., I] -> [..., O].  zero: the weights begin at zero."""
    drawn = zeros_init() if zero else init
    given = {"kernel_init": drawn} if drawn else {}
    return nnx.Linear(
        cin, cout, use_bias=bias, dtype=dtype, param_dtype=jnp.float32, dot_general=dot_rows, rngs=rngs, **given
    )


def dot_rows(x: jax.Array, kernel: jax.Array, dimension_numbers=None, **options) -> jax.Array:
    """[..., I] times [I, O], in the form that nnx.Linear calls: lax.dot_general along the last axis.

    For CPUs with all other axes made one: for the kernel's gradient, a sum over them, XLA would transpose an operand in
    memory for want of it, which takes as long as the product. There by oneDNN, if it is not a small one.
    """
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) if lowering.target() == "cpu" else x
    if operations.multiplies(rows, kernel, 2 * rows.size * kernel.shape[-1]):
        y = operations.product(rows, kernel)
    else:
        y = jax.lax.dot_general(rows, kernel, (((rows.ndim - 1,), (0,)), ((), ())), **options)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def embed_label(embed: nnx.Embed, cond: dict, batch: int, num_classes: int) -> jax.Array:
    """The embedding [B, E] of cond["label"], or of the null label `num_classes` where it is missing.

    The null label's is the table's last row; of a table without one (trained on labels alone) it is 0.
    """
    label = cond.get("label", jnp.full((batch,), num_classes, jnp.int32))
    if embed.num_embeddings > num_classes:
        return embed(label)
    return jnp.where((label < num_classes)[:, None], embed(jnp.minimum(label, num_classes - 1)), 0.0)


def in_turn(emb: jax.Array, key: jax.Array | None, calls: int, *, remat: bool, constrain: Callable) -> Callable:
    """`run(module, x)`, constrain(module(x, emb, k)) with a dropout key k for each of `calls` calls, in their order.

    key: None switches dropout off.  remat: what the modules hold is computed again in the backward pass.
    """
    # All at once: each alone would be a hundred scalar operations.
    keys = iter([None] * calls if key is None else jax.random.split(key, calls))

    def run(module: Callable, x: jax.Array) -> jax.Array:
        k = next(keys)
        call = jax.checkpoint(module) if remat else module
        return constrain(call(x, emb, k))

    return run


def with_image(x: jax.Array, cond: dict) -> jax.Array:
    """x with cond["image"] beside it, if there is one, along the channels."""
    return jnp.concatenate([x, cond["image"].astype(x.dtype)], axis=-1) if "image" in cond else x


def upsample(x: jax.Array) -> jax.Array:
    """Nearest neighbour, twice the size, as a broadcast: no gather. [B, H, W, C] -> [B, 2H, 2W, C]."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


def unbiased(conv: nnx.Conv, x: jax.Array) -> jax.Array:
    """conv(x) without its bias, for a caller who adds that to [B, C] numbers instead: to an array as large as the
    output, its gradient is a sum over all of that."""
    x, kernel = _operands(conv, x)
    strides, padding = cast(tuple[int, int], conv.strides), cast(tuple[tuple[int, int], ...], conv.padding)
    return convolve(x, kernel, strides, padding, dimension_numbers=NHWC)


def bias(conv: nnx.Conv) -> jax.Array:
    """The bias [C] that `unbiased` leaves out, float32."""
    return cast(nnx.Param, conv.bias)[...]


def _operands(conv: nnx.Conv, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x and the kernel in the type that `conv` computes in."""
    dtype = conv.dtype or jnp.result_type(x, conv.kernel[...])
    return x.astype(dtype), conv.kernel[...].astype(dtype)


def conv_of_upsampled(conv: nnx.Conv, x: jax.Array, *, biased: bool = True) -> jax.Array:
    """conv(upsample(x)) for a 3x3 convolution that keeps the size. [B, H, W, C] -> [B, 2H, 2W, out].

    On CPUs as four 2x2 convolutions of x, one for each parity of row and column: of the 3x3 pixels that an output sees
    some are copies of one another, whose weights add up. 4/9 of the products, and nothing is copied. Elsewhere a
    bandwidth, not the products, is likely to bound it, and there it was not measured.

    biased: False leaves out the bias, see `unbiased`.
    """

    def plus(y, added):
        return y + added[0][None, None, None] if added else y

    def plainly(x, kernel, *added):
        return plus(jax.lax.conv_general_dilated(upsample(x), kernel, (1, 1), "SAME", dimension_numbers=NHWC), added)

    def by_parity(x, kernel, *added):
        b, h, w, _ = x.shape

        def merged(k, parity, axis):  # rows (or columns) -1, 0, 1 of the large image, on those of the small one
            first, middle, last = jnp.split(k, 3, axis)
            return jnp.concatenate([first + middle, last] if parity else [first, middle + last], axis)

        def one(row, column):
            k = merged(merged(kernel, row, 0), column, 1)
            pads = ((1 - row, row), (1 - column, column))
            return plus(convolve(x, k, (1, 1), pads, dimension_numbers=NHWC), added)

        y = jnp.stack([jnp.stack([one(i, j) for j in (0, 1)], axis=3) for i in (0, 1)], axis=2)
        return y.reshape(b, 2 * h, 2 * w, -1)

    x, kernel = _operands(conv, x)
    added = (bias(conv).astype(x.dtype),) if biased else ()
    return jax.lax.platform_dependent(x, kernel, *added, cpu=by_parity, default=plainly)


def downsample(x: jax.Array) -> jax.Array:
    """The mean of 2x2 blocks. [B, H, W, C] -> [B, H/2, W/2, C]."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def space_to_depth(x: jax.Array, patch: int) -> jax.Array:
    """Folds patch x patch pixels into channels: [B, H, W, C] -> [B, H/p, W/p, p p C]."""
    if patch == 1:
        return x
    b, h, w, c = x.shape
    x = x.reshape(b, h // patch, patch, w // patch, patch, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h // patch, w // patch, patch * patch * c)


def depth_to_space(x: jax.Array, patch: int) -> jax.Array:
    """The inverse of space_to_depth."""
    if patch == 1:
        return x
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, patch, patch, c // patch**2).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h * patch, w * patch, c // patch**2)


class Attention(nnx.Module):
    """Self-attention over all positions with a residual, pre-normalised (DDPM, ADM). [B, H, W, C] -> same.

    groups: of the norm, see group_norm; -1 is no norm.  scale: what the sum with the residual is divided by.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        *,
        groups: int = 0,
        eps: float = 1e-5,
        scale: float = 1.0,
        dtype=None,
        rngs: nnx.Rngs,
    ):
        self.heads, self.scale = heads, scale
        self.norm = None if groups < 0 else group_norm(channels, groups=groups, eps=eps)
        self.qkv = dense(channels, 3 * channels, dtype=dtype, rngs=rngs)
        self.out = dense(channels, channels, zero=True, dtype=dtype, rngs=rngs)
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        y = x if self.norm is None else self.norm(x)
        q, k, v = project_qkv(self.qkv, y.reshape(b, h * w, c), self.heads)
        y = attention(q, k, v)
        x = x + self.out(y.reshape(b, h * w, c)).reshape(x.shape).astype(x.dtype)
        return x if self.scale == 1 else x / self.scale
