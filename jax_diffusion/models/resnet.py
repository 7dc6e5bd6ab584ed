"""The blocks that the U-Net and its encoder half are built of (see unet.py for the papers)."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_diffusion.errors import UserError, choose
from jax_diffusion.models import layers
from jax_diffusion.models.norm import activate

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "mish": jax.nn.mish,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
}


class ResBlock(nnx.Module):
    """norm, activation, conv; the embedding added or as scale and shift; norm, activation, dropout, zero-initialised
    conv.

    resample: "up" or "down" changes the size between the first activation and the first convolution, on both
        branches (ADM's resblock_updown); None keeps it.
    scale: what the sum of both branches is divided by.
    """

    def __init__(
        self,
        cin: int,
        cout: int,
        embedding: int,
        *,
        dropout: float,
        scale_shift: bool,
        resample: str | None = None,
        activation: str = "silu",
        scale: float = 1.0,
        groups: int,
        eps: float,
        dtype,
        rngs: nnx.Rngs,
    ):
        kw = {"dtype": dtype, "rngs": rngs}
        self.norm1 = layers.group_norm(cin, groups=groups, eps=eps)
        self.conv1 = layers.conv(cin, cout, **kw)
        self.embed = layers.dense(embedding, 2 * cout if scale_shift else cout, **kw)
        self.norm2 = layers.group_norm(cout, groups=groups, eps=eps)
        self.conv2 = layers.conv(cout, cout, zero=True, **kw)
        self.shortcut = layers.conv(cin, cout, 1, **kw) if cin != cout else None
        self.scale_shift, self.scale, self.dropout = scale_shift, scale, dropout
        self.activation, self.up = ACTIVATIONS[activation], resample == "up"
        self.resample = {"up": layers.upsample, "down": layers.downsample, None: lambda x: x}[resample]

    def __call__(self, x: jax.Array, emb_BxE: jax.Array, key: jax.Array | None) -> jax.Array:
        h = activate(x, *self.norm1.affine(x), self.activation)
        if self.up:
            h = layers.conv_of_upsampled(self.conv1, h, biased=False)
        else:
            h = layers.unbiased(self.conv1, self.resample(h))
        e_BxC = self.embed(self.activation(emb_BxE)).astype(jnp.float32)
        bias_C = layers.bias(self.conv1)
        if self.scale_shift:
            scale, shift = jnp.split(e_BxC, 2, axis=-1)
            a, b = self.norm2.affine(h, jnp.broadcast_to(bias_C, scale.shape))
            a, b = a * (1 + scale), b * (1 + scale) + shift
        else:
            a, b = self.norm2.affine(h, e_BxC + bias_C[None])
        h = activate(h, a, b, self.activation, rate=self.dropout, key=key)
        h = self.conv2(h)
        x = self.resample(x)
        if self.shortcut is not None:
            x = self.shortcut(x)
        x = x + h.astype(x.dtype)
        return x if self.scale == 1 else x / self.scale


class Stage(nnx.Module):
    """A residual block and, where the level attends, attention. The unit of remat and of the skip list."""

    def __init__(self, block: ResBlock, attention: layers.Attention | None):
        self.block = block
        self.attention = attention

    def __call__(self, x, emb, key):
        x = self.block(x, emb, key)
        return x if self.attention is None else self.attention(x)


class Resample(nnx.Module):
    """DDPM's change of size: a strided convolution down, nearest neighbour and a convolution up.

    convolve: False takes the mean of 2x2 pixels down, nearest neighbour up, and has no parameters.
    """

    def __init__(
        self, channels: int, direction: str, padding: tuple[int, int], convolve: bool, *, dtype, rngs: nnx.Rngs
    ):
        self.up = direction == "up"
        kw = {"dtype": dtype, "rngs": rngs}
        if not convolve:
            self.conv = None
        elif self.up:
            self.conv = layers.conv(channels, channels, **kw)
        else:
            self.conv = layers.conv(channels, channels, stride=2, padding=padding, **kw)

    def __call__(self, x, emb, key):
        if self.conv is None:
            return layers.upsample(x) if self.up else layers.downsample(x)
        return layers.conv_of_upsampled(self.conv, x) if self.up else self.conv(x)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Makes the blocks of one network: what they have in common."""

    embedding: int  # width of the time embedding
    heads: int  # attention heads, unless
    head_channels: int  # says their width
    dropout: float
    scale_shift: bool
    activation: str
    resblock_updown: bool  # change size inside residual blocks
    resample_conv: bool  # else by a convolution
    downsample_padding: tuple[int, int]
    norm_groups: int
    norm_eps: float
    dtype: Any
    rngs: nnx.Rngs

    def stage(
        self,
        cin: int,
        cout: int,
        attends: bool,
        resample: str | None = None,
        *,
        attention_groups: int | None = None,  # of the attention's norm, -1: no norm; None: norm_groups
        scale: float = 1.0,
    ) -> Stage:
        kw = {"eps": self.norm_eps, "dtype": self.dtype, "rngs": self.rngs}
        block = ResBlock(cin, cout, self.embedding, dropout=self.dropout, scale_shift=self.scale_shift, scale=scale,
                         resample=resample, activation=self.activation, groups=self.norm_groups, **kw)  # fmt: skip
        if not attends:
            return Stage(block, None)
        heads = cout // self.head_channels if self.head_channels else self.heads
        groups = self.norm_groups if attention_groups is None else attention_groups
        return Stage(block, layers.Attention(cout, heads, groups=groups, scale=scale, **kw))

    def resize(self, width: int, direction: str) -> nnx.Module:
        if self.resblock_updown:
            return self.stage(width, width, False, direction)
        return Resample(width, direction, self.downsample_padding, self.resample_conv, dtype=self.dtype, rngs=self.rngs)

    def down(
        self,
        stem: int,  # channels that come in
        widths: Sequence[int],  # channels of each level
        blocks: int,
        attention_levels: Sequence[int],
    ) -> tuple[list[Any], list[int]]:
        """The way down, and the channels after the stem and after each of its modules."""
        modules: list[Any] = []  # Stages and Resamples
        channels = [stem]
        for level, width in enumerate(widths):
            for _ in range(blocks):
                modules.append(self.stage(channels[-1], width, level in attention_levels))
                channels.append(width)
            if level < len(widths) - 1:
                modules.append(self.resize(width, "down"))
                channels.append(width)
        return modules, channels


def block_maker(attending: Sequence[int], *, dtype: str, **options: Any) -> Callable[[nnx.Rngs], Blocks]:
    """rngs -> Blocks. attending: the widths that attend. Raises UserError for options that make no blocks."""
    choose("model.dtype", dtype, ("float32", "bfloat16"))
    choose("model.activation", options["activation"], ACTIVATIONS)
    check_heads(attending, options["heads"], options["head_channels"])
    return lambda rngs: Blocks(dtype=jnp.dtype(dtype), rngs=rngs, **options)


def level_widths(channels: int, multipliers: Sequence[float]) -> tuple[int, ...]:
    """The channels of each level. Raises UserError where a multiplier gives no whole number."""
    for m in multipliers:
        if channels * m < 1 or abs(channels * m - round(channels * m)) > 1e-6:
            raise UserError(f"model.multipliers={tuple(multipliers)}: {m} times model.channels={channels} is no width")
    return tuple(round(channels * m) for m in multipliers)


def multipliers_of(widths: Sequence[int], channels: int) -> tuple[float, ...]:
    """The inverse of level_widths; whole numbers where they are."""
    return tuple(w // channels if w % channels == 0 else w / channels for w in widths)


def check_heads(attending: Sequence[int], heads: int, head_channels: int) -> None:
    """Raises UserError unless the heads, or their width where it is given, divide the widths that attend."""
    by = "head_channels" if head_channels else "heads"
    for width in attending:
        if width % (head_channels or heads):
            raise UserError(
                f"model.{by}={head_channels or heads} does not divide the {width} channels of an attending level"
            )


def check_size(height: int, width: int, multipliers: Sequence[float], patch: int = 1) -> None:
    """Raises UserError unless the size can be halved at every level but the last."""
    stride = patch * 2 ** (len(multipliers) - 1)
    if height % stride or width % stride:
        raise UserError(
            f"image size {height}x{width} does not divide by {stride}, which model.multipliers="
            f"{tuple(multipliers)} and model.patch={patch} need: use multiples of {stride} (data.size) or fewer levels"
        )
