"""Layers shared by the networks. Parameters and statistics are float32; `dtype` is what matmuls run in."""

import math

import jax
import jax.numpy as jnp
from flax import nnx


def zeros_init():
    return nnx.initializers.zeros_init()


def sinusoidal_embedding(t: jax.Array, features: int, max_period: float = 10_000.0) -> jax.Array:
    """[cos, sin] of t at `features/2` geometric frequencies from 1 to 1/max_period: [B] -> [B, features].

    Vaswani et al. 2017 with DDPM's conventions as guided-diffusion orders them (cosine first).
    """
    half = features // 2
    freqs = jnp.exp(-math.log(max_period) / half * jnp.arange(half, dtype=jnp.float32))
    angle = t.astype(jnp.float32)[:, None] * freqs[None]
    out = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    return jnp.pad(out, ((0, 0), (0, features % 2)))


class FourierEmbedding(nnx.Module):
    """[cos, sin] of 2 pi t w, w ~ N(0, scale^2) fixed at initialisation (Song et al. 2021, app. C; EDM).

    The frequencies are stored with the parameters, so that they are saved, but are never trained.
    """

    def __init__(self, features: int, scale: float = 16.0, *, rngs: nnx.Rngs):
        self.frequencies = nnx.Param(scale * jax.random.normal(rngs.params(), (features // 2,), jnp.float32))

    def __call__(self, t: jax.Array) -> jax.Array:
        w = jax.lax.stop_gradient(self.frequencies[...])
        angle = 2 * jnp.pi * t.astype(jnp.float32)[:, None] * w[None]
        return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def group_norm(channels: int, *, groups: int = 0, eps: float = 1e-5, rngs: nnx.Rngs) -> nnx.GroupNorm:
    """GroupNorm in float32 with one-pass statistics; as many groups as divide the channels, up to `groups`.

    groups: 0 is 32, fewer where a group would have less than 4 channels (EDM's rule). In a group of one channel
        the norm takes away whatever was added to the whole channel: an added time embedding is lost.
    """
    groups = groups or min(32, max(channels // 4, 1))
    return nnx.GroupNorm(
        channels,
        num_groups=math.gcd(groups, channels),
        epsilon=eps,
        use_fast_variance=True,
        dtype=jnp.float32,
        rngs=rngs,
    )


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
        rngs=rngs,
        **init,
    )


def dense(cin, cout, *, zero=False, dtype=None, rngs) -> nnx.Linear:
    init = {"kernel_init": zeros_init()} if zero else {}
    return nnx.Linear(cin, cout, dtype=dtype, param_dtype=jnp.float32, rngs=rngs, **init)


def embed_label(embed: nnx.Embed, cond: dict, batch: int) -> jax.Array:
    """The embedding [B, E] of cond["label"]; of the null label, the table's last row, where it is missing."""
    null = jnp.full((batch,), embed.num_embeddings - 1, jnp.int32)
    return embed(cond.get("label", null))


def upsample(x: jax.Array) -> jax.Array:
    """Nearest neighbour, twice the size, as a broadcast: no gather. [B, H, W, C] -> [B, 2H, 2W, C]."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


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
    """Self-attention over all positions with a residual, pre-normalised (DDPM, ADM). [B, H, W, C] -> same."""

    def __init__(self, channels: int, heads: int, *, groups: int = 0, eps: float = 1e-5, dtype=None, rngs: nnx.Rngs):
        self.heads = heads
        self.norm = group_norm(channels, groups=groups, eps=eps, rngs=rngs)
        self.qkv = dense(channels, 3 * channels, dtype=dtype, rngs=rngs)
        self.out = dense(channels, channels, zero=True, dtype=dtype, rngs=rngs)
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        qkv = self.qkv(self.norm(x).reshape(b, h * w, c))
        q, k, v = jnp.moveaxis(qkv.reshape(b, h * w, 3, self.heads, c // self.heads), 2, 0)
        y = jax.nn.dot_product_attention(q, k, v)  # scaled once, softmax in float32
        return x + self.out(y.reshape(b, h * w, c)).reshape(x.shape).astype(x.dtype)
