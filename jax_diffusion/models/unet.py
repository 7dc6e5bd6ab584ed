"""The U-Net of DDPM, improved diffusion and ADM.

    DDPM       Ho et al. 2020, appendix B: additive time embedding, one attention resolution, strided convs.
    improved   Nichol & Dhariwal 2021: scale-shift time embedding, several heads, learned variance.
    ADM        Dhariwal & Nichol 2021, section 3: attention at several resolutions, resampling inside residual
               blocks, class embedding added to the time embedding.

Sizes in names: B batch, H W height and width, C channels, E embedding.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_diffusion.errors import choose
from jax_diffusion.models import layers
from jax_diffusion.models.network import Network, from_module, run_inner
from jax_diffusion.models.norm import activate
from jax_diffusion.models.resnet import Blocks, block_maker, check_size, level_widths

TIME_EMBEDDINGS = ("sinusoidal", "fourier", "log_fourier")
MIDDLES = ("attention", "blocks", "none")


class UNet(nnx.Module):
    """See `unet` for the arguments; `make` makes the blocks, `widths` are the channels of the levels."""

    def __init__(self, *, make: Blocks, image_channels, out_channels, channels, stem_channels, widths, blocks,
                 attention_levels, middle, middle_norm_groups, middle_scale, time_embedding, time_scale,
                 frequency_shift, sine_first, center_input, num_classes, null_label, patch, remat,
                 constrain):  # fmt: skip
        kw: dict[str, Any] = {"rngs": make.rngs}
        emb = make.embedding
        features = 2 * channels if time_embedding == "log_fourier" else channels
        sinusoidal = time_embedding == "sinusoidal"
        self.fourier = None if sinusoidal else layers.FourierEmbedding(features, sine_first=sine_first, **kw)
        self.time1 = layers.dense(features, emb, **kw)
        self.time2 = layers.dense(emb, emb, **kw)
        # The extra row is the null label of classifier-free guidance.
        self.label = (
            nnx.Embed(num_classes + null_label, emb, embedding_init=nnx.initializers.normal(1.0), **kw)
            if num_classes
            else None
        )
        self.stem = layers.conv(image_channels * patch**2, stem_channels, dtype=make.dtype, **kw)

        down, skips = make.down(stem_channels, widths, blocks, attention_levels)
        width, up, grow = skips[-1], [], []
        groups = middle_norm_groups or make.norm_groups
        self.middle = nnx.List(
            make.stage(width, width, attends, attention_groups=groups, scale=middle_scale)
            for attends in {"attention": (True, False), "blocks": (False, False), "none": ()}[middle]
        )
        for level in reversed(range(len(widths))):
            for _ in range(blocks + 1):
                up.append(make.stage(width + skips.pop(), widths[level], level in attention_levels))
                width = widths[level]
            if level:
                grow.append(make.resize(width, "up"))
        self.down, self.up, self.grow = nnx.List(down), nnx.List(up), nnx.List(grow)
        self.norm = layers.group_norm(width, groups=make.norm_groups, eps=make.norm_eps)
        self.head = layers.conv(width, out_channels * patch**2, zero=True, **kw)
        self.time_embedding, self.time_scale, self.channels = time_embedding, time_scale, channels
        self.frequencies = {"shift": frequency_shift, "sine_first": sine_first}
        self.blocks, self.patch, self.num_classes, self.center_input = blocks, patch, num_classes, center_input
        self.remat, self.constrain = remat, constrain

    def embedding(self, c_noise: jax.Array, cond: dict) -> jax.Array:
        """Time and label, [B] -> [B, E] float32."""
        if self.fourier is None:
            e = layers.sinusoidal_embedding(self.time_scale * c_noise, self.channels, **self.frequencies)
        else:
            e = self.fourier(jnp.log(c_noise) if self.time_embedding == "log_fourier" else c_noise)
        e = self.time2(jax.nn.silu(self.time1(e)))
        if self.label is not None:
            e = e + layers.embed_label(self.label, cond, len(c_noise), self.num_classes)
        return e

    def __call__(
        self,
        x: jax.Array,
        c_noise: jax.Array,
        cond: dict,
        key: jax.Array | None,
        depth: int = 1,  # modules of the way up, from its end, that are outer layers; as many of the way down
        inner: Callable = run_inner,
    ) -> jax.Array:
        emb = self.constrain(self.embedding(c_noise, cond))
        calls = sum(len(part) for part in (self.down, self.middle, self.up, self.grow))
        run = layers.in_turn(emb, key, calls, remat=self.remat, constrain=self.constrain)
        x = layers.with_image(x, cond)
        if self.center_input:
            x = 2 * x - 1
        h = self.constrain(self.stem(layers.space_to_depth(x, self.patch)))
        down, up = list(self.down), list(enumerate(self.up))
        skips = [h]

        def descend(modules, h, skips):
            for module in modules:
                h = run(module, h)
                skips.append(h)
            return h

        def ascend(modules, h, skips):
            for i, module in modules:
                h = run(module, jnp.concatenate([h, skips.pop()], axis=-1))
                level_done = (i + 1) % (self.blocks + 1) == 0
                if level_done and i + 1 < len(up):
                    h = run(self.grow[i // (self.blocks + 1)], h)
            return h

        def deep(h):
            """What enters the outer part of the way up (DeepCache: Ma et al. 2024, section 3.2)."""
            skips: list[jax.Array] = []
            h = descend(down[depth - 1 :], h, skips)
            for module in self.middle:
                h = run(module, h)
            return ascend(up[:-depth], h, skips)

        h = descend(down[: depth - 1], h, skips)
        h = inner(deep, h)
        h = ascend(up[-depth:], h, skips)
        out = self.head(activate(h.astype(jnp.float32), *self.norm.affine(h))).astype(jnp.float32)
        out = layers.depth_to_space(out, self.patch)
        return out / c_noise[:, None, None, None] if self.time_embedding == "log_fourier" else out


def unet(
    shape: tuple[int, int, int],  # H, W, C of a sample
    *,
    channels: int = 128,  # the unit of width, and of the time embedding
    multipliers: Sequence[float] = (1, 2, 2, 2),  # width of each level in units of `channels`
    stem_channels: int = 0,  # of the first convolution; 0: `channels`
    blocks: int = 2,  # residual blocks per level (one more on the way up)
    attention_levels: Sequence[int] = (1,),  # levels that attend; 0 is full resolution
    heads: int = 1,  # attention heads, unless head_channels says their width
    head_channels: int = 0,  # channels per head; 0: use `heads`
    dropout: float = 0.0,
    activation: str = "silu",  # of the residual blocks: silu, mish, gelu, relu
    scale_shift: bool = False,  # time embedding as scale and shift of the second norm; else added
    resblock_updown: bool = False,  # change size inside residual blocks (ADM); else by a convolution
    resample_conv: bool = True,  # False: else by mean and nearest neighbour alone
    downsample_padding: tuple[int, int] = (0, 1),  # (0, 1) DDPM's, (1, 1) PyTorch's padding=1
    middle: str = "attention",  # between the ways; "blocks": residual blocks alone; "none"
    middle_norm_groups: int = 0,  # of its attention; 0: norm_groups; -1: no norm
    middle_scale: float = 1.0,  # its residual sums are divided by it
    time_embedding: str = "sinusoidal",  # "fourier"; "log_fourier": of log c_noise, and the output divided by c_noise
    time_scale: float = 1.0,  # what c_noise is multiplied by in a sinusoidal embedding
    embedding_channels: int = 0,  # of the time embedding; 0: 4 `channels`
    frequency_shift: float = 0.0,  # of the sinusoidal embedding, layers.sinusoidal_embedding; 1 in DDPM's own code
    sine_first: bool = False,  # the embedding is [sin, cos]: DDPM's own code; else [cos, sin]
    center_input: bool = False,  # images in [0, 1] come in: show the network 2 x - 1
    num_classes: int = 0,  # 0: unconditional
    null_label: bool = True,  # the label table has a row for "no label"; False: no label adds nothing (ADM)
    cond_channels: int = 0,  # channels of cond["image"], concatenated to the input
    patch: int = 1,  # pixels a side that are folded into channels first (simple diffusion, section 2)
    learn_variance: bool = False,  # twice the output channels
    norm_groups: int = 0,  # of GroupNorm; 0: 32, fewer where a group would have less than 4 channels
    norm_eps: float = 1e-5,
    remat: bool = False,  # recompute each stage in the backward pass
    dtype: str = "float32",  # of matmuls and convolutions
    constrain: Callable[[jax.Array], jax.Array] = lambda x: x,  # sharding of activations, see placement.py
) -> Network:
    """The U-Net as a Network. Raises UserError where a size does not divide."""
    choose("model.time_embedding", time_embedding, TIME_EMBEDDINGS)
    choose("model.middle", middle, MIDDLES)
    height, width, image_channels = shape
    check_size(height, width, multipliers, patch)
    widths = level_widths(channels, multipliers)
    attending = [widths[l] for l in attention_levels if l < len(widths)]
    blocks_of = block_maker(
        attending=attending + [widths[-1]] * (middle == "attention"),
        embedding=embedding_channels or 4 * channels,
        heads=heads,
        head_channels=head_channels,
        dropout=dropout,
        scale_shift=scale_shift,
        activation=activation,
        resblock_updown=resblock_updown,
        resample_conv=resample_conv,
        downsample_padding=tuple(downsample_padding),
        norm_groups=norm_groups,
        norm_eps=norm_eps,
        dtype=dtype,
    )
    return from_module(
        lambda rngs: UNet(
            make=blocks_of(rngs),
            image_channels=image_channels + cond_channels,
            out_channels=image_channels * (2 if learn_variance else 1),
            channels=channels,
            stem_channels=stem_channels or channels,
            widths=widths,
            blocks=blocks,
            attention_levels=tuple(attention_levels),
            middle=middle,
            middle_norm_groups=middle_norm_groups,
            middle_scale=middle_scale,
            time_embedding=time_embedding,
            time_scale=time_scale,
            frequency_shift=frequency_shift,
            sine_first=sine_first,
            center_input=center_input,
            num_classes=num_classes,
            null_label=null_label,
            patch=patch,
            remat=remat,
            constrain=constrain,
        ),
        num_classes,
        depths=len(widths) * (blocks + 1) - 1,
    )
