"""DDPM++ and NCSN++, the U-Nets of score-based generative modelling, as EDM trains them.

    DDPM++   Song et al. 2021, appendix H: DDPM's U-Net with BigGAN's resampling inside residual blocks, every sum
             rescaled by 1/sqrt(2) and a deeper encoder.
    NCSN++   the same with the filter [1, 3, 3, 1] in place of 2x2 boxes, random Fourier features of the noise level,
             and a pyramid of the input summed into the encoder (and, in Song's own models, one of the output).
    EDM      Karras et al. 2022, appendix F.1: both at 128 channels and three levels, labels and augmentation
             entering with the noise embedding.

Sizes in names: B batch, H W height and width, C channels, E embedding.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_diffusion.errors import UserError, choose
from jax_diffusion.models import filters, layers
from jax_diffusion.models.network import Network, from_module
from jax_diffusion.models.norm import activate
from jax_diffusion.models.resnet import check_heads, check_size, level_widths

ROOT_HALF = math.sqrt(0.5)  # of every sum of two branches, which keeps its variance

PRESETS = {
    "ddpmpp": {"time_embedding": "sinusoidal", "noise_width": 1, "encoder": "standard", "resample_filter": (1, 1)},
    "ncsnpp": {"time_embedding": "fourier", "noise_width": 2, "encoder": "residual", "resample_filter": (1, 3, 3, 1)},
}  # EDM's of CIFAR-10: make("song_unet", (32, 32, 3), **PRESETS["ncsnpp"])


class Block(nnx.Module):
    """norm, SiLU, conv; the embedding added; norm, SiLU, dropout, conv; the sum with the input rescaled; attention,
    its sum rescaled too.

    resample: "up" or "down" changes the size before the first convolution and on the other branch, which then has a
    1x1 convolution whatever the channels are; None keeps it.
    """

    def __init__(
        self,
        cin: int,
        cout: int,
        embedding: int,
        *,
        taps: Sequence[int],
        dropout: float,
        resample: str | None = None,
        heads: int = 0,  # 0: no attention
        first_groups: int = 0,
        attention_groups: int = 0,
        dtype,
        rngs: nnx.Rngs,
    ):
        kw: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.norm1 = layers.group_norm(cin, groups=first_groups, eps=1e-6)
        self.conv1 = layers.conv(cin, cout, **kw)
        self.embed = layers.dense(embedding, cout, **kw)
        self.norm2 = layers.group_norm(cout, eps=1e-6)
        self.conv2 = layers.conv(cout, cout, zero=True, **kw)
        self.shortcut = layers.conv(cin, cout, 1, **kw) if resample or cin != cout else None
        norm: dict[str, Any] = {"groups": attention_groups, "eps": 1e-6}
        self.attention = layers.Attention(cout, heads, scale=1 / ROOT_HALF, **norm, **kw) if heads else None
        self.resample, self.taps, self.dropout = resample, tuple(taps), dropout

    def __call__(self, x: jax.Array, emb_BxE: jax.Array, key: jax.Array | None) -> jax.Array:
        resize = {"up": filters.upsample, "down": filters.downsample, None: lambda x, _: x}[self.resample]
        h = layers.unbiased(self.conv1, resize(activate(x, *self.norm1.affine(x)), self.taps))
        a, b = self.norm2.affine(h, self.embed(emb_BxE).astype(jnp.float32) + layers.bias(self.conv1)[None])
        h = self.conv2(activate(h, a, b, rate=self.dropout, key=key))
        x = resize(x, self.taps)
        if self.shortcut is not None:
            x = self.shortcut(x)
        x = ROOT_HALF * (x + h.astype(x.dtype))
        return x if self.attention is None else self.attention(x)


class SongUNet(nnx.Module):
    """See `song_unet` for the arguments."""

    def __init__(self, *, rngs: nnx.Rngs, image_channels, out_channels, channels, widths, blocks,
                 attention_levels, heads, head_channels, dropout, time_embedding, time_scale, noise_width,
                 embedding_width, encoder, decoder, resample_filter, num_classes, null_label, augment_dim, group_rule,
                 center_input, unit_range, remat, dtype, constrain):  # fmt: skip
        kw = {"dtype": dtype, "rngs": rngs}
        noise, emb, taps = noise_width * channels, embedding_width * channels, resample_filter
        fixed = 32 if group_rule == "diffusers" else 0

        def block(cin, cout, attends=False, resample=None, **groups):
            count = (cout // head_channels if head_channels else heads) if attends else 0
            return Block(cin, cout, emb, taps=taps, dropout=dropout, resample=resample, heads=count, **groups, **kw)

        sinusoidal = time_embedding == "sinusoidal"
        self.fourier = None if sinusoidal else layers.FourierEmbedding(noise, sine_first=True, rngs=rngs)
        self.label = layers.dense(num_classes + null_label, noise, rngs=rngs) if num_classes else None
        self.augment = layers.dense(augment_dim, noise, bias=False, rngs=rngs) if augment_dim else None
        self.time1 = layers.dense(noise, emb, rngs=rngs)
        self.time2 = layers.dense(emb, emb, rngs=rngs)
        self.stem = layers.conv(image_channels, channels, **kw)

        levels = list(enumerate(widths))
        down, shrink, inputs, up, grow, norms, heads_out = [], [], [], [], [], [], []
        width, pyramid, skips = channels, image_channels, [channels]
        for level, cout in levels:
            if level:
                shrink.append(block(width, width, resample="down"))
                skips.append(width)
                if encoder == "skip":
                    inputs.append(layers.conv(pyramid, width, 1, **kw))
                if encoder == "residual":  # filtered after the convolution, which therefore makes the overhang
                    pad = 1 + filters.overhang(taps)
                    inputs.append(layers.conv(pyramid, width, padding=(pad, pad), **kw))
                    pyramid = width
            for _ in range(blocks):
                attends = level in attention_levels
                down.append(block(width, cout, attends, attention_groups=fixed))
                width = cout
                skips.append(width)
        self.middle = nnx.List([block(width, width, True), block(width, width)])
        for level, cout in reversed(levels):
            if level < len(levels) - 1:
                grow.append(block(width, width, resample="up"))
            attends = level in attention_levels
            for i in range(blocks + 1):
                skip, groups = skips.pop(), {"attention_groups": fixed}
                if fixed and attends:
                    groups["first_groups"] = min(width + skip // 4, 32)
                up.append(block(width + skip, cout, attends and i == blocks, **groups))
                width = cout
            if decoder == "skip" or level == 0:
                norms.append(layers.group_norm(width, eps=1e-6))
                heads_out.append(layers.conv(width, out_channels, zero=True, rngs=rngs))
        self.down, self.shrink, self.inputs = nnx.List(down), nnx.List(shrink), nnx.List(inputs)
        self.up, self.grow, self.norms, self.heads = map(nnx.List, (up, grow, norms, heads_out))
        self.levels, self.blocks, self.noise, self.num_classes = len(levels), blocks, noise, num_classes
        self.encoder, self.decoder, self.taps = encoder, decoder, taps
        self.score, self.time_scale = time_embedding == "log_fourier", time_scale
        self.center_input, self.unit_range = center_input, unit_range
        self.remat, self.constrain = remat, constrain

    def embedding(self, noise: jax.Array, cond: dict) -> jax.Array:
        """Noise level, label and augmentation, [B] -> [B, E] float32."""
        if self.fourier is None:
            e = layers.sinusoidal_embedding(noise, self.noise, shift=1, sine_first=True)
        else:
            e = self.fourier(noise)
        if self.label is not None:
            label = cond.get("label", jnp.full(noise.shape, self.num_classes, jnp.int32))
            # One-hot with unit variance; a null label that has no row of its own is a row of zeros.
            one_hot = jax.nn.one_hot(label, self.label.in_features, dtype=jnp.float32)
            e = e + self.label(math.sqrt(self.num_classes) * one_hot)
        if self.augment is not None and "augment" in cond:
            e = e + self.augment(cond["augment"].astype(jnp.float32))
        return jax.nn.silu(self.time2(jax.nn.silu(self.time1(e))))

    def __call__(self, x: jax.Array, c_noise: jax.Array, cond: dict, key: jax.Array | None) -> jax.Array:
        if self.unit_range != self.center_input:  # [-1, 1] to [0, 1], or back; both together change nothing
            x = (x + 1) / 2 if self.unit_range else 2 * x - 1
        noise = self.time_scale * c_noise
        if self.score:
            noise = jnp.log(noise / 2 if self.unit_range else noise)
        emb = self.embedding(noise, cond)
        calls = sum(map(len, (self.down, self.shrink, self.middle, self.grow, self.up)))
        run = layers.in_turn(emb, key, calls, remat=self.remat, constrain=self.constrain)
        x = layers.with_image(x, cond)
        pyramid, h = x, self.constrain(self.stem(x))
        skips = [h]
        for level in range(self.levels):
            if level:
                h = run(self.shrink[level - 1], h)
                if self.encoder == "skip":
                    pyramid = filters.downsample(pyramid, self.taps)
                    h = self.constrain(h + self.inputs[level - 1](pyramid))
                if self.encoder == "residual":
                    below = filters.filter_down(self.inputs[level - 1](pyramid), self.taps)
                    h = pyramid = self.constrain(ROOT_HALF * (h + below))
                skips.append(h)
            for module in self.down[level * self.blocks : (level + 1) * self.blocks]:
                h = run(module, h)
                skips.append(h)
        for module in self.middle:
            h = run(module, h)
        out, each = None, self.blocks + 1
        for i in range(self.levels):  # from the coarsest
            if i:
                h = run(self.grow[i - 1], h)
            for module in self.up[i * each : (i + 1) * each]:
                h = run(module, jnp.concatenate([h, skips.pop()], axis=-1))
            if self.decoder == "skip" or i == self.levels - 1:
                j = i if self.decoder == "skip" else 0
                image = self.heads[j](jax.nn.silu(self.norms[j](h))).astype(jnp.float32)
                out = image if out is None else filters.upsample(out, self.taps) + image
        assert out is not None
        return out / c_noise[:, None, None, None] if self.score else out


def song_unet(
    shape: tuple[int, int, int],  # H, W, C of a sample
    *,
    channels: int = 128,  # width of the first convolution
    multipliers: Sequence[float] = (2, 2, 2),  # width of each level in units of `channels`
    blocks: int = 4,  # residual blocks per level (one more on the way up)
    attention_levels: Sequence[int] = (1,),  # levels that attend; 0 is full resolution
    heads: int = 1,  # attention heads, unless head_channels says their width
    head_channels: int = 0,  # channels per head; 0: use `heads`
    dropout: float = 0.0,
    time_embedding: str = "sinusoidal",  # or "fourier"; "log_fourier": of log c_noise, the output divided by c_noise
    time_scale: float = 1.0,  # c_noise is multiplied by it first
    noise_width: int = 1,  # numbers in it, in units of `channels`: 1 DDPM++, 2 NCSN++
    embedding_width: int = 4,  # of what the blocks are given, in units of `channels`
    encoder: str = "standard",  # a pyramid of the input added: "skip" its pixels, "residual" its features
    decoder: str = "standard",  # or "skip": the output is a sum over the levels
    resample_filter: Sequence[int] = (1, 1),  # or (1, 3, 3, 1)
    num_classes: int = 0,  # 0: unconditional
    null_label: bool = True,  # a row of the label matrix for "no label"; False: it is all zeros (EDM)
    augment_dim: int = 0,  # length of cond["augment"], what non-leaking augmentation did to a sample (EDM: 9)
    cond_channels: int = 0,  # channels of cond["image"], concatenated to the input
    learn_variance: bool = False,  # twice the output channels
    center_input: bool = False,  # images in [0, 1] come in: show the network 2 x - 1
    unit_range: bool = False,  # its weights are for images in [0, 1]: ours, and their sigma, are halved on the way in
    group_rule: str = "edm",  # of GroupNorm; or "diffusers": other counts below 128 channels
    remat: bool = False,  # recompute each block in the backward pass
    dtype: str = "float32",  # of matmuls and convolutions
    constrain: Callable[[jax.Array], jax.Array] = lambda x: x,  # sharding of activations, see placement.py
) -> Network:
    """DDPM++ (the defaults are EDM's of CIFAR-10), NCSN++ and what lies between; see PRESETS.

    log_fourier and unit_range are for the variance-exploding models of Song et al. 2021, which learn the score of
    images in [0, 1] from x and sigma as they are: process.prediction="score" with raw_inputs.
    Raises UserError where a size does not divide.
    """
    choose("model.time_embedding", time_embedding, ("sinusoidal", "fourier", "log_fourier"))
    choose("model.encoder", encoder, ("standard", "skip", "residual"))
    choose("model.decoder", decoder, ("standard", "skip"))
    choose("model.group_rule", group_rule, ("edm", "diffusers"))
    choose("model.dtype", dtype, ("float32", "bfloat16"))
    if tuple(resample_filter) not in filters.FILTERS:
        known = " or ".join(map(str, filters.FILTERS))
        raise UserError(f"model.resample_filter={tuple(resample_filter)} is unknown: use {known}")
    height, width, image_channels = shape
    check_size(height, width, multipliers)
    widths = level_widths(channels, multipliers)
    check_heads([*(widths[l] for l in attention_levels if l < len(widths)), widths[-1]], heads, head_channels)
    return from_module(
        lambda rngs: SongUNet(
            rngs=rngs,
            image_channels=image_channels + cond_channels,
            out_channels=image_channels * (2 if learn_variance else 1),
            channels=channels,
            widths=widths,
            blocks=blocks,
            attention_levels=tuple(attention_levels),
            heads=heads,
            head_channels=head_channels,
            dropout=dropout,
            time_embedding=time_embedding,
            time_scale=time_scale,
            noise_width=noise_width,
            embedding_width=embedding_width,
            encoder=encoder,
            decoder=decoder,
            resample_filter=tuple(resample_filter),
            num_classes=num_classes,
            null_label=null_label,
            augment_dim=augment_dim,
            group_rule=group_rule,
            center_input=center_input,
            unit_range=unit_range,
            remat=remat,
            dtype=jnp.dtype(dtype),
            constrain=constrain,
        ),
        num_classes,
    )
