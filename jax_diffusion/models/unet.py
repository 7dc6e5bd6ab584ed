"""The U-Net of DDPM, improved diffusion and ADM.

    DDPM       Ho et al. 2020, appendix B: additive time embedding, one attention resolution, strided convs.
    improved   Nichol & Dhariwal 2021: scale-shift time embedding, several heads, learned variance.
    ADM        Dhariwal & Nichol 2021, section 3: attention at several resolutions, resampling inside residual
               blocks, class embedding added to the time embedding.

Sizes in names: B batch, H W height and width, C channels, E embedding.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jax_diffusion.errors import UserError, choose
from jax_diffusion.models import layers
from jax_diffusion.models.network import Network, from_module


class ResBlock(nnx.Module):
    """norm, SiLU, conv; the embedding added or as scale and shift; norm, SiLU, dropout, zero-initialised conv.

    resample: "up" or "down" changes the size between the first activation and the first convolution, on both
    branches (ADM's resblock_updown); None keeps it.
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
        groups: int,
        eps: float,
        dtype,
        rngs: nnx.Rngs,
    ):
        kw = {"dtype": dtype, "rngs": rngs}
        self.norm1 = layers.group_norm(cin, groups=groups, eps=eps, rngs=rngs)
        self.conv1 = layers.conv(cin, cout, **kw)
        self.embed = layers.dense(embedding, 2 * cout if scale_shift else cout, **kw)
        self.norm2 = layers.group_norm(cout, groups=groups, eps=eps, rngs=rngs)
        self.dropout = nnx.Dropout(dropout)
        self.conv2 = layers.conv(cout, cout, zero=True, **kw)
        self.shortcut = layers.conv(cin, cout, 1, **kw) if cin != cout else None
        self.scale_shift = scale_shift
        self.resample = {"up": layers.upsample, "down": layers.downsample, None: lambda x: x}[resample]

    def __call__(self, x: jax.Array, emb_BxE: jax.Array, key: jax.Array | None) -> jax.Array:
        h = self.conv1(self.resample(jax.nn.silu(self.norm1(x))))
        e = self.embed(jax.nn.silu(emb_BxE))[:, None, None, :].astype(jnp.float32)
        if self.scale_shift:
            scale, shift = jnp.split(e, 2, axis=-1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h.astype(jnp.float32) + e)
        h = jax.nn.silu(h)
        if key is not None:
            h = self.dropout(h, rngs=key)
        h = self.conv2(h)
        x = self.resample(x)
        if self.shortcut is not None:
            x = self.shortcut(x)
        return x + h.astype(x.dtype)


class Stage(nnx.Module):
    """A residual block and, where the level attends, attention. The unit of remat and of the skip list."""

    def __init__(self, block: ResBlock, attention: layers.Attention | None):
        self.block = block
        self.attention = attention

    def __call__(self, x, emb, key):
        x = self.block(x, emb, key)
        return x if self.attention is None else self.attention(x)


class Resample(nnx.Module):
    """DDPM's change of size: a strided convolution down, nearest neighbour and a convolution up."""

    def __init__(self, channels: int, direction: str, padding: tuple[int, int], *, dtype, rngs: nnx.Rngs):
        self.up = direction == "up"
        kw = {"dtype": dtype, "rngs": rngs}
        if self.up:
            self.conv = layers.conv(channels, channels, **kw)
        else:
            self.conv = layers.conv(channels, channels, stride=2, padding=padding, **kw)

    def __call__(self, x, emb, key):
        return self.conv(layers.upsample(x) if self.up else x)


class UNet(nnx.Module):
    """See `unet` for the arguments."""

    def __init__(self, *, rngs: nnx.Rngs, shape, out_channels, channels, multipliers, blocks, attention_levels,
                 heads, head_channels, dropout, scale_shift, resblock_updown, downsample_padding, time_embedding,
                 num_classes, cond_channels, patch, norm_groups, norm_eps, remat, dtype, constrain):  # fmt: skip
        kw = {"dtype": dtype, "rngs": rngs}
        norm = {"groups": norm_groups, "eps": norm_eps}
        emb = 4 * channels

        def stage(cin, cout, attends, resample=None):
            block = ResBlock(cin, cout, emb, dropout=dropout, scale_shift=scale_shift, resample=resample,
                             **norm, **kw)  # fmt: skip
            n = cout // head_channels if head_channels else heads
            return Stage(block, layers.Attention(cout, n, **norm, **kw) if attends else None)

        def resize(width, direction):
            if resblock_updown:
                return stage(width, width, False, direction)
            return Resample(width, direction, downsample_padding, **kw)

        self.fourier = layers.FourierEmbedding(channels, rngs=rngs) if time_embedding == "fourier" else None
        self.time1 = layers.dense(channels, emb, rngs=rngs)
        self.time2 = layers.dense(emb, emb, rngs=rngs)
        # The extra row is the null label of classifier-free guidance.
        self.label = (
            nnx.Embed(num_classes + 1, emb, embedding_init=nnx.initializers.normal(1.0), rngs=rngs)
            if num_classes
            else None
        )
        self.stem = layers.conv((shape[-1] + cond_channels) * patch**2, channels, **kw)

        levels = list(enumerate(multipliers))
        down, up, grow = [], [], []
        width, skips = channels, [channels]
        for level, multiplier in levels:
            for _ in range(blocks):
                down.append(stage(width, channels * multiplier, level in attention_levels))
                width = channels * multiplier
                skips.append(width)
            if level < len(levels) - 1:
                down.append(resize(width, "down"))
                skips.append(width)
        self.middle = nnx.List([stage(width, width, True), stage(width, width, False)])
        for level, multiplier in reversed(levels):
            for _ in range(blocks + 1):
                up.append(stage(width + skips.pop(), channels * multiplier, level in attention_levels))
                width = channels * multiplier
            if level:
                grow.append(resize(width, "up"))
        self.down, self.up, self.grow = nnx.List(down), nnx.List(up), nnx.List(grow)
        self.norm = layers.group_norm(width, **norm, rngs=rngs)
        self.head = layers.conv(width, out_channels * patch**2, zero=True, rngs=rngs)
        self.channels, self.blocks, self.patch = channels, blocks, patch
        self.remat, self.dtype, self.constrain = remat, dtype, constrain

    def embedding(self, c_noise: jax.Array, cond: dict) -> jax.Array:
        """Time and label, [B] -> [B, E] float32."""
        sinusoidal = layers.sinusoidal_embedding
        e = self.fourier(c_noise) if self.fourier else sinusoidal(c_noise, self.channels)
        e = self.time2(jax.nn.silu(self.time1(e)))
        if self.label is not None:
            e = e + layers.embed_label(self.label, cond, len(c_noise))
        return e

    def __call__(self, x: jax.Array, c_noise: jax.Array, cond: dict, key: jax.Array | None) -> jax.Array:
        emb = self.embedding(c_noise, cond)
        count = 0

        def run(module, x):
            nonlocal count
            k = None if key is None else jax.random.fold_in(key, count)
            count += 1
            call = jax.checkpoint(module) if self.remat else module
            return self.constrain(call(x, emb, k))

        if "image" in cond:
            x = jnp.concatenate([x, cond["image"].astype(x.dtype)], axis=-1)
        h = self.constrain(self.stem(layers.space_to_depth(x, self.patch)))
        skips = [h]
        for module in self.down:
            h = run(module, h)
            skips.append(h)
        for module in self.middle:
            h = run(module, h)
        for i, module in enumerate(self.up):
            h = run(module, jnp.concatenate([h, skips.pop()], axis=-1))
            level_done = (i + 1) % (self.blocks + 1) == 0
            if level_done and skips:
                h = run(self.grow[i // (self.blocks + 1)], h)
        out = self.head(jax.nn.silu(self.norm(h))).astype(jnp.float32)
        return layers.depth_to_space(out, self.patch)


def unet(
    shape: tuple[int, int, int],  # H, W, C of a sample
    *,
    channels: int = 128,  # width of the first level
    multipliers: Sequence[int] = (1, 2, 2, 2),  # width of each level in units of `channels`
    blocks: int = 2,  # residual blocks per level (one more on the way up)
    attention_levels: Sequence[int] = (1,),  # levels that attend; 0 is full resolution
    heads: int = 1,  # attention heads, unless head_channels says their width
    head_channels: int = 0,  # channels per head; 0: use `heads`
    dropout: float = 0.0,
    scale_shift: bool = False,  # time embedding as scale and shift of the second norm; else added
    resblock_updown: bool = False,  # change size inside residual blocks (ADM); else by a convolution
    downsample_padding: tuple[int, int] = (0, 1),  # (0, 1) DDPM's, (1, 1) PyTorch's padding=1
    time_embedding: str = "sinusoidal",  # or "fourier"
    num_classes: int = 0,  # 0: unconditional
    cond_channels: int = 0,  # channels of cond["image"], concatenated to the input
    patch: int = 1,  # pixels a side that are folded into channels first (simple diffusion, section 2)
    learn_variance: bool = False,  # twice the output channels
    norm_groups: int = 0,  # of GroupNorm; 0: 32, fewer where a group would have less than 4 channels
    norm_eps: float = 1e-5,
    remat: bool = False,  # recompute each stage in the backward pass
    dtype: str = "float32",  # of matmuls and convolutions
    constrain: Callable[[jax.Array], jax.Array] = lambda x: x,  # sharding of activations, see sharding.py
) -> Network:
    """The U-Net as a Network. Raises UserError where a size does not divide."""
    choose("model.time_embedding", time_embedding, ("sinusoidal", "fourier"))
    choose("model.dtype", dtype, ("float32", "bfloat16"))
    height, width, image_channels = shape
    stride = patch * 2 ** (len(multipliers) - 1)
    if height % stride or width % stride:
        raise UserError(
            f"image size {height}x{width} does not divide by {stride}, which model.multipliers="
            f"{tuple(multipliers)} and model.patch={patch} need: use multiples of {stride} (data.size) or fewer levels"
        )
    attending = {channels * multipliers[l] for l in attention_levels if l < len(multipliers)}
    for c in attending | {channels * multipliers[-1]}:
        if c % (head_channels or heads):
            raise UserError(
                f"model.{'head_channels' if head_channels else 'heads'}={head_channels or heads} "
                f"does not divide the {c} channels of an attending level"
            )
    return from_module(
        lambda rngs: UNet(
            rngs=rngs,
            shape=tuple(shape),
            out_channels=image_channels * (2 if learn_variance else 1),
            channels=channels,
            multipliers=tuple(multipliers),
            blocks=blocks,
            attention_levels=tuple(attention_levels),
            heads=heads,
            head_channels=head_channels,
            dropout=dropout,
            scale_shift=scale_shift,
            resblock_updown=resblock_updown,
            downsample_padding=tuple(downsample_padding),
            time_embedding=time_embedding,
            num_classes=num_classes,
            cond_channels=cond_channels,
            patch=patch,
            norm_groups=norm_groups,
            norm_eps=norm_eps,
            remat=remat,
            dtype=jnp.dtype(dtype),
            constrain=constrain,
        ),
        num_classes,
    )
