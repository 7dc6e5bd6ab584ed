"""The U-Net of the denoising_diffusion_pytorch package (lucidrains), unconditional and class-conditional.

DDPM's U-Net (Ho et al. 2020, appendix B) with attention at every level, which is linear in the number of pixels
(Shen et al. 2021, "Efficient Attention") at all levels but the last:

    q normalised over features, k over positions:   out = (softmax_N(k)^T v)^T softmax_D(q) / sqrt(D)       (1)

Norms are RMS norms over channels; keys and values gain a few learned ones (`memory`); the skip connections of the two
blocks of a level are concatenated before each of them; down-sampling folds 2x2 pixels into channels.

Sizes in names: B batch, H heads, D channels per head, M memory, N positions and memory, E embedding.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jax_diffusion.attention import attention, linear_attention, project_qkv
from jax_diffusion.errors import UserError, choose
from jax_diffusion.models import layers
from jax_diffusion.models.network import Network, from_module
from jax_diffusion.models.norm import dropout

TIME_EMBEDDINGS = ("sinusoidal", "learned_fourier", "random_fourier")


class RMSNorm(nnx.Module):
    """x / rms(x) times a learned gain, over the channels, in float32 (Zhang & Sennrich 2019, eq. 4)."""

    def __init__(self, channels: int):
        self.scale = nnx.Param(jnp.ones((channels,), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        # The floor is torch.nn.functional.normalize's.
        norm = jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-24))
        return x * norm * (self.scale[...] * math.sqrt(x.shape[-1])).reshape((1,) * (x.ndim - 1) + (-1,))


class TimeEmbedding(nnx.Module):
    """Features of the time, then two layers: [B] -> [B, E]. Sine first; the last frequency is 1/max_period."""

    def __init__(self, kind: str, channels: int, frequencies: int, max_period: float, embedding: int, *, rngs):
        self.kind, self.half, self.max_period = kind, channels // 2, max_period
        fixed = kind == "sinusoidal"
        self.frequencies = None if fixed else nnx.Param(jax.random.normal(rngs.params(), (frequencies,), jnp.float32))
        width = 2 * self.half if fixed else 2 * frequencies + 1
        self.dense1 = layers.dense(width, embedding, rngs=rngs)
        self.dense2 = layers.dense(embedding, embedding, rngs=rngs)

    def features(self, t: jax.Array) -> jax.Array:
        if self.frequencies is None:
            return layers.sinusoidal_embedding(t, 2 * self.half, self.max_period, shift=1.0, sine_first=True)
        t, w = t.astype(jnp.float32)[:, None], self.frequencies[...]
        angle = t * (w if self.kind == "learned_fourier" else jax.lax.stop_gradient(w))[None] * 2 * jnp.pi
        return jnp.concatenate([t, jnp.sin(angle), jnp.cos(angle)], -1)

    def __call__(self, t: jax.Array) -> jax.Array:
        return self.dense2(jax.nn.gelu(self.dense1(self.features(t)), approximate=False))


class LabelEmbedding(nnx.Module):
    """A table with a row for "no label", then two layers: [B] -> [B, E]."""

    def __init__(self, num_classes: int, null_label: bool, channels: int, embedding: int, *, rngs):
        init = nnx.initializers.normal(1.0)
        self.table = nnx.Embed(num_classes + null_label, channels, embedding_init=init, rngs=rngs)
        self.dense1 = layers.dense(channels, embedding, rngs=rngs)
        self.dense2 = layers.dense(embedding, embedding, rngs=rngs)
        self.num_classes = num_classes

    def __call__(self, cond: dict, batch: int) -> jax.Array:
        e = layers.embed_label(self.table, cond, batch, self.num_classes)
        return self.dense2(jax.nn.gelu(self.dense1(e), approximate=False))


class ResBlock(nnx.Module):
    """Twice conv, norm, SiLU; the embedding scales and shifts the first norm."""

    def __init__(self, cin: int, cout: int, embedding: int, *, dropout: float, dtype, rngs: nnx.Rngs):
        kw = {"dtype": dtype, "rngs": rngs}
        self.embed = layers.dense(embedding, 2 * cout, **kw)
        self.conv1 = layers.conv(cin, cout, **kw)
        self.norm1 = RMSNorm(cout)
        self.dropout = dropout
        self.conv2 = layers.conv(cout, cout, **kw)
        self.norm2 = RMSNorm(cout)
        self.shortcut = layers.dense(cin, cout, **kw) if cin != cout else None

    def __call__(self, x: jax.Array, emb_BxE: jax.Array, key: jax.Array | None) -> jax.Array:
        e = self.embed(jax.nn.silu(emb_BxE))[:, None, None, :].astype(jnp.float32)
        scale, shift = jnp.split(e, 2, axis=-1)
        h = jax.nn.silu(self.norm1(self.conv1(x)) * (scale + 1) + shift)
        h = jax.nn.silu(self.norm2(self.conv2(dropout(h, self.dropout, key))))
        return h + (x if self.shortcut is None else self.shortcut(x)).astype(h.dtype)


class Attention(nnx.Module):
    """Self-attention over all positions and `memory` learned keys and values, pre-normalised, with a residual.

    linear: equation 1 of the module, whose result is normalised again; else softmax attention.
    """

    def __init__(self, channels: int, heads: int, head_channels: int, memory: int, linear: bool, *, dtype, rngs):
        width = heads * head_channels
        kw = {"dtype": dtype, "rngs": rngs}
        self.norm = RMSNorm(channels)
        self.qkv = layers.dense(channels, 3 * width, bias=False, **kw)
        kv = (2, memory, heads, head_channels)
        self.memory = nnx.Param(jax.random.normal(rngs.params(), kv, jnp.float32)) if memory else None
        self.out = layers.dense(width, channels, **kw)
        self.out_norm = RMSNorm(channels) if linear else None
        self.heads, self.linear = heads, linear

    def __call__(self, x: jax.Array) -> jax.Array:
        b, height, width, c = x.shape
        q, k, v = project_qkv(self.qkv, self.norm(x).reshape(b, height * width, c), self.heads)
        if self.memory is not None:
            extra = jnp.broadcast_to(self.memory[...].astype(k.dtype)[:, None], (2, b, *self.memory.shape[1:]))
            k, v = jnp.concatenate([extra[0], k], 1), jnp.concatenate([extra[1], v], 1)
        y = linear_attention(q, k, v) if self.linear else attention(q, k, v)
        y = self.out(y.reshape(b, height, width, -1))
        return x + (y if self.out_norm is None else self.out_norm(y)).astype(x.dtype)


class Resample(nnx.Module):
    """Half the size ("fold": 2x2 pixels into channels, "stride": a 4x4 convolution), twice it ("up"), or "same"."""

    def __init__(self, cin: int, cout: int, kind: str, *, dtype, rngs: nnx.Rngs):
        kw = {"dtype": dtype, "rngs": rngs}
        if kind == "fold":
            self.conv: nnx.Linear | nnx.Conv = layers.dense(4 * cin, cout, **kw)
        elif kind == "stride":
            self.conv = layers.conv(cin, cout, 4, stride=2, padding=(1, 1), **kw)
        else:
            self.conv = layers.conv(cin, cout, **kw)
        self.before = {"fold": lambda x: layers.space_to_depth(x, 2), "up": layers.upsample}.get(kind, lambda x: x)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(self.before(x))


class Level(nnx.Module):
    """Two residual blocks, attention, and what leads to the next level."""

    def __init__(self, block1: ResBlock, block2: ResBlock, attention: Attention, resample: Resample | None):
        self.block1, self.block2, self.attention, self.resample = block1, block2, attention, resample


class LinearAttentionUNet(nnx.Module):
    """See `linear_attention_unet` for the arguments."""

    def __init__(self, *, rngs: nnx.Rngs, shape, out_channels, channels, stem_channels, multipliers,
                 full_attention_levels, heads, head_channels, memory, downsampling, dropout, time_embedding,
                 frequencies, max_period, num_classes, null_label, cond_channels, remat, dtype, constrain):  # fmt: skip
        kw = {"dtype": dtype, "rngs": rngs}
        emb = 4 * channels
        widths = [stem_channels or channels, *(channels * m for m in multipliers)]
        last = len(multipliers) - 1

        def block(cin, cout):
            return ResBlock(cin, cout, 2 * emb if num_classes else emb, dropout=dropout, **kw)

        def attention(width, level, linear):
            return Attention(width, heads[level], head_channels[level], memory, linear, **kw)

        def level(l, cin, cout, resample):
            # Up, each block is given the features of its counterpart on the way down beside its own.
            wide = cin + (widths[l] if resample in ("up", "same_up") else 0)
            attend = attention(cin, l, l not in full_attention_levels)
            change = Resample(cin, cout, resample.removesuffix("_up"), **kw)
            return Level(block(wide, cin), block(wide, cin), attend, change)

        self.stem = layers.conv(shape[-1] + cond_channels, widths[0], 7, **kw)
        self.time = TimeEmbedding(time_embedding, channels, frequencies, max_period, emb, rngs=rngs)
        self.label = LabelEmbedding(num_classes, null_label, channels, emb, rngs=rngs) if num_classes else None
        self.down = nnx.List(
            [level(l, widths[l], widths[l + 1], downsampling if l < last else "same") for l in range(last + 1)]
        )
        middle = widths[-1]
        self.middle = Level(block(middle, middle), block(middle, middle), attention(middle, last + 1, False), None)
        self.up = nnx.List(
            [level(l, widths[l + 1], widths[l], "up" if l else "same_up") for l in reversed(range(last + 1))]
        )
        self.final = block(2 * widths[0], widths[0])
        self.head = layers.dense(widths[0], out_channels, rngs=rngs)
        self.cond_channels, self.remat, self.constrain = cond_channels, remat, constrain

    def __call__(self, x: jax.Array, c_noise: jax.Array, cond: dict, key: jax.Array | None) -> jax.Array:
        emb = self.time(c_noise)
        if self.label is not None:
            emb = jnp.concatenate([emb, self.label(cond, len(c_noise))], -1)
        calls = 2 * len(self.down) + 2 + 2 * len(self.up) + 1
        block = layers.in_turn(emb, key, calls, remat=self.remat, constrain=self.constrain)

        def plain(module, x):
            return self.constrain((jax.checkpoint(module) if self.remat else module)(x))

        if self.cond_channels:
            # No image is a black one: how networks with self-conditioning are shown that there is no estimate yet.
            blank = jnp.zeros((*x.shape[:-1], self.cond_channels), x.dtype)
            x = jnp.concatenate([x, cond.get("image", blank).astype(x.dtype)], -1)
        stem = h = plain(self.stem, x)
        skips = []
        for level in self.down:
            h = block(level.block1, h)
            skips.append(h)
            h = plain(level.attention, block(level.block2, h))
            skips.append(h)
            h = plain(level.resample, h)
        h = block(self.middle.block1, h)
        h = block(self.middle.block2, plain(self.middle.attention, h))
        for level in self.up:
            h = block(level.block1, jnp.concatenate([h, skips.pop()], -1))
            h = block(level.block2, jnp.concatenate([h, skips.pop()], -1))
            h = plain(level.resample, plain(level.attention, h))
        h = block(self.final, jnp.concatenate([h, stem.astype(h.dtype)], -1))
        return self.head(h).astype(jnp.float32)


def linear_attention_unet(
    shape: tuple[int, int, int],  # H, W, C of a sample
    *,
    channels: int = 64,  # width that `multipliers` and the embeddings are units of
    stem_channels: int = 0,  # width of the first convolution; 0: `channels`
    multipliers: Sequence[int] = (1, 2, 4, 8),  # width that each level leads to, in units of `channels`
    full_attention_levels: Sequence[int] = (-1,),  # levels of softmax attention; the others' is linear. -1: the last
    heads: Sequence[int] = (4,),  # attention heads: of all, of each level, or of each level and of the middle
    head_channels: Sequence[int] = (32,),  # channels per head, in the same way
    memory: int = 4,  # learned keys and values that every attention has beside the positions'
    downsampling: str = "fold",  # 2x2 pixels into channels; or "stride", a 4x4 convolution
    dropout: float = 0.0,
    time_embedding: str = "sinusoidal",  # or learned_fourier, random_fourier (of frequencies that are not trained)
    frequencies: int = 8,  # of the Fourier features
    max_period: float = 10_000.0,  # of the sinusoids
    num_classes: int = 0,  # 0: unconditional
    null_label: bool = True,  # the label table has a row for "no label"
    cond_channels: int = 0,  # channels of cond["image"], concatenated to the input; zeros where it is missing
    learn_variance: bool = False,  # twice the output channels
    remat: bool = False,  # recompute each block in the backward pass
    dtype: str = "float32",  # of matmuls and convolutions
    constrain: Callable[[jax.Array], jax.Array] = lambda x: x,  # sharding of activations, see placement.py
) -> Network:
    """The U-Net as a Network. Raises UserError where a size does not divide."""
    choose("model.time_embedding", time_embedding, TIME_EMBEDDINGS)
    choose("model.downsampling", downsampling, ("fold", "stride"))
    choose("model.dtype", dtype, ("float32", "bfloat16"))
    count = len(multipliers)
    height, width, image_channels = shape
    stride = 2 ** (count - 1)
    if height % stride or width % stride:
        raise UserError(
            f"image size {height}x{width} does not divide by {stride}, which model.multipliers={tuple(multipliers)} "
            f"needs: use multiples of {stride} (data.size) or fewer levels"
        )
    if channels < 4 or channels % 2:
        raise UserError(f"model.channels={channels}: an even number from 4 on is needed for the time embedding")
    if any(not -count <= l < count for l in full_attention_levels):
        raise UserError(
            f"model.full_attention_levels={tuple(full_attention_levels)}: there are levels 0 to {count - 1}"
        )

    def of_each(name: str, values: Sequence[int]) -> tuple[int, ...]:
        values = tuple(values)
        if len(values) not in (1, count, count + 1):
            raise UserError(f"model.{name}={values}: give one number, or one for each of the {count} levels")
        return values * (count + 1) if len(values) == 1 else (*values, values[-1])[: count + 1]

    return from_module(
        lambda rngs: LinearAttentionUNet(
            rngs=rngs,
            shape=tuple(shape),
            out_channels=image_channels * (2 if learn_variance else 1),
            channels=channels,
            stem_channels=stem_channels,
            multipliers=tuple(multipliers),
            full_attention_levels={l % count for l in full_attention_levels},
            heads=of_each("heads", heads),
            head_channels=of_each("head_channels", head_channels),
            memory=memory,
            downsampling=downsampling,
            dropout=dropout,
            time_embedding=time_embedding,
            frequencies=frequencies,
            max_period=max_period,
            num_classes=num_classes,
            null_label=null_label,
            cond_channels=cond_channels,
            remat=remat,
            dtype=jnp.dtype(dtype),
            constrain=constrain,
        ),
        num_classes,
    )
