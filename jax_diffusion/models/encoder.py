"""ADM's classifier of noisy images (Dhariwal & Nichol 2021, section 4 and appendix I): the way down and the middle of
the U-Net, and a pool. It is no denoiser; guidance.classifier takes its log_likelihood.

    logits = network.apply(params, x_t, t)                                  # [B, classes]
    guided = guidance.classifier(denoise, log_likelihood(network, params, labels), schedule, scale)

Sizes in names: B batch, N positions, C channels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_diffusion.attention import attention, project_qkv
from jax_diffusion.errors import choose
from jax_diffusion.models import layers
from jax_diffusion.models.network import Network, from_module
from jax_diffusion.models.resnet import Blocks, block_maker, check_size, level_widths

POOLS = ("attention", "adaptive", "spatial", "spatial_v2")
HIDDEN = 2048  # of the spatial pools


class AttentionPool(nnx.Module):
    """What one more token, the mean of all, gathers from them (Radford et al. 2021, CLIP, section 2.4).
    [B, H, W, C] -> [B, out]."""

    def __init__(self, positions: int, channels: int, heads: int, out: int, *, dtype, rngs: nnx.Rngs):
        noise = jax.random.normal(rngs.params(), (positions + 1, channels), jnp.float32)
        self.position = nnx.Param(noise / channels**0.5)
        self.qkv = layers.dense(channels, 3 * channels, dtype=dtype, rngs=rngs)
        self.out = layers.dense(channels, out, rngs=rngs)
        self.heads = heads

    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        x = x.reshape(b, h * w, c)
        x_BxNxC = jnp.concatenate([x.mean(1, keepdims=True), x], axis=1) + self.position[...][None]
        q, k, v = project_qkv(self.qkv, x_BxNxC, self.heads)
        return self.out(attention(q[:, :1], k, v).reshape(b, c))


class Encoder(nnx.Module):
    """See `encoder` for the arguments; `make` makes the blocks, `widths` are the channels of the levels."""

    def __init__(self, *, make: Blocks, shape, channels, stem_channels, widths, blocks, attention_levels, num_classes,
                 pool, pool_heads, remat, constrain):  # fmt: skip
        kw, width = {"rngs": make.rngs}, widths[-1]
        self.time1 = layers.dense(channels, make.embedding, **kw)
        self.time2 = layers.dense(make.embedding, make.embedding, **kw)
        self.stem = layers.conv(shape[-1], stem_channels, dtype=make.dtype, **kw)
        down, counts = make.down(stem_channels, widths, blocks, attention_levels)
        self.down = nnx.List(down)
        self.middle = nnx.List([make.stage(width, width, True), make.stage(width, width, False)])
        features = sum(counts) + width
        spatial = pool.startswith("spatial")
        # Which of these there are and are used, `pool` decides.
        self.hidden: Any = layers.dense(features, HIDDEN, **kw) if spatial else None
        groups: dict[str, Any] = {"groups": make.norm_groups, "eps": make.norm_eps}
        normed = {"spatial": 0, "spatial_v2": HIDDEN}.get(pool, width)
        self.norm: Any = layers.group_norm(normed, **groups) if normed else None
        if pool == "attention":
            stride = 2 ** (len(widths) - 1)
            positions = (shape[0] // stride) * (shape[1] // stride)
            self.out: Any = AttentionPool(positions, width, pool_heads, num_classes, dtype=make.dtype, **kw)
        else:
            zero = pool == "adaptive"
            self.out = layers.dense(HIDDEN if spatial else width, num_classes, zero=zero, **kw)
        self.channels, self.pool, self.remat, self.constrain = channels, pool, remat, constrain

    def __call__(self, x: jax.Array, c_noise: jax.Array, cond: dict, key: jax.Array | None) -> jax.Array:
        emb = self.time2(jax.nn.silu(self.time1(layers.sinusoidal_embedding(c_noise, self.channels))))
        h = self.constrain(self.stem(x))
        seen = [h]
        modules = [*self.down, *self.middle]
        run = layers.in_turn(emb, key, len(modules), remat=self.remat, constrain=self.constrain)
        for module in modules:
            h = run(module, h)
            seen.append(h)
        h = h.astype(jnp.float32)
        if self.pool == "attention":
            return self.out(jax.nn.silu(self.norm(h))).astype(jnp.float32)
        if self.pool == "adaptive":
            return self.out(jax.nn.silu(self.norm(h)).mean((1, 2)))
        del seen[-2]  # of the middle's two blocks what comes out
        h = self.hidden(jnp.concatenate([s.astype(jnp.float32).mean((1, 2)) for s in seen], axis=-1))
        return self.out(jax.nn.relu(h) if self.norm is None else jax.nn.silu(self.norm(h)))


def encoder(
    shape: tuple[int, int, int],  # H, W, C of a sample
    *,
    num_classes: int,
    channels: int = 128,  # the unit of width, and of the time embedding
    multipliers: Sequence[float] = (1, 2, 3, 4),  # width of each level in units of `channels`
    stem_channels: int = 0,  # of the first convolution; 0: `channels`
    blocks: int = 2,  # residual blocks per level
    attention_levels: Sequence[int] = (1, 2, 3),  # levels that attend; 0 is full resolution
    heads: int = 1,  # attention heads, unless head_channels says their width
    head_channels: int = 64,  # channels per head; 0: use `heads`
    pool: str = "attention",  # adaptive: the mean; spatial: the means of all blocks; spatial_v2: those, normed
    dropout: float = 0.0,
    scale_shift: bool = True,  # time embedding as scale and shift of the second norm; else added
    resblock_updown: bool = True,  # change size inside residual blocks; else by a convolution
    resample_conv: bool = True,  # False: else by the mean
    downsample_padding: tuple[int, int] = (1, 1),  # (0, 1) DDPM's, (1, 1) PyTorch's padding=1
    norm_groups: int = 0,  # of GroupNorm; 0: 32, fewer where a group would have less than 4 channels
    norm_eps: float = 1e-5,
    remat: bool = False,  # recompute each block in the backward pass
    dtype: str = "float32",  # of matmuls and convolutions
    constrain: Callable[[jax.Array], jax.Array] = lambda x: x,  # sharding of activations, see placement.py
) -> Network:
    """The classifier as a Network: (x [B, H, W, C], c_noise [B]) -> logits [B, num_classes].
    Raises UserError where a size does not divide."""
    choose("model.pool", pool, POOLS)
    check_size(shape[0], shape[1], multipliers)
    widths = level_widths(channels, multipliers)
    blocks_of = block_maker(
        attending=[*(widths[l] for l in attention_levels if l < len(widths)), widths[-1]],
        embedding=4 * channels,
        heads=heads,
        head_channels=head_channels,
        dropout=dropout,
        activation="silu",
        scale_shift=scale_shift,
        resblock_updown=resblock_updown,
        resample_conv=resample_conv,
        downsample_padding=tuple(downsample_padding),
        norm_groups=norm_groups,
        norm_eps=norm_eps,
        dtype=dtype,
    )
    return from_module(
        lambda rngs: Encoder(
            make=blocks_of(rngs),
            shape=tuple(shape),
            channels=channels,
            stem_channels=stem_channels or channels,
            widths=widths,
            blocks=blocks,
            attention_levels=tuple(attention_levels),
            num_classes=num_classes,
            pool=pool,
            pool_heads=widths[-1] // head_channels if head_channels else heads,
            remat=remat,
            constrain=constrain,
        ),
        num_classes,
    )


def log_likelihood(network: Network, params: Any, label: jax.Array) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """(x_t [B, ...], t [] or [B]) -> log p(label | x_t, t) [B]; t as the classifier was trained with it: the step of
    a discrete schedule. label: [B]."""

    def log_prob(x, t):
        logits = network.apply(params, x, jnp.broadcast_to(jnp.asarray(t, jnp.float32), x.shape[:1]), {})
        return jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], axis=1)[:, 0]

    return log_prob
