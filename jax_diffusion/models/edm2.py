"""EDM2's U-Net, config G: every layer preserves magnitude.

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", figure 21 and table 6. No
norms with statistics over groups, no biases: weights are normalised, sums and concatenations weighted, encoder
blocks begin with a pixel norm, and the input has a channel of ones in place of the biases. Two kinds of scalars are
learned: the gain of each block's embedding and that of the output, both 0 at first.

The width alone tells the published sizes apart (`WIDTHS`; parameters at 1000 classes without a null label):
XS 125 M, S 280 M, M 498 M, L 777 M, XL 1.1 G, XXL 1.5 G.

Use it with EDM's preconditioning: schedule "edm", prediction "edm". Sizes in names: B batch, C channels, E embedding.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jax_diffusion.attention import attention, split_qkv
from jax_diffusion.errors import UserError, choose
from jax_diffusion.models import layers, norm
from jax_diffusion.models.magnitude import MPConv, MPFourier, mp_concat, mp_silu, mp_sum, normalize, project
from jax_diffusion.models.network import Network, from_module

WIDTHS = {"XS": 128, "S": 192, "M": 256, "L": 320, "XL": 384, "XXL": 448}  # `channels` of the published sizes


class CosineAttention(nnx.Module):
    """Self-attention with q, k and v each normalised over a head's channels, summed with its input."""

    def __init__(self, channels: int, heads: int, balance: float, *, dtype, rngs: nnx.Rngs):
        self.qkv = MPConv(channels, 3 * channels, dtype=dtype, rngs=rngs)
        self.out = MPConv(channels, channels, dtype=dtype, rngs=rngs)
        self.heads, self.balance = heads, balance

    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        qkv = split_qkv(self.qkv(x).reshape(b, h * w, 3 * c), self.heads)
        q, k, v = (normalize(part, (-1,)) for part in qkv)
        y = attention(q, k, v)
        return mp_sum(x, self.out(y.reshape(b, h, w, c)), self.balance)


class Block(nnx.Module):
    """Figure 21. An encoder block narrows and pixel-normalises its main path first; a decoder block's residual
    branch sees all channels and its main path is narrowed last."""

    def __init__(
        self,
        cin: int,
        cout: int,
        embedding: int,
        *,
        encodes: bool,
        resample: str | None = None,
        attends: bool = False,
        takes_skip: bool = False,
        head_channels: int,
        dropout: float,
        residual_balance: float,
        attention_balance: float,
        clip: float,
        dtype,
        rngs: nnx.Rngs,
    ):
        kw = {"dtype": dtype, "rngs": rngs}
        heads = cout // head_channels if attends else 0
        self.embed_gain = nnx.Param(jnp.zeros((), jnp.float32))
        self.embed = MPConv(embedding, cout, rngs=rngs)
        self.conv1 = MPConv(cout if encodes else cin, cout, 3, **kw)
        self.conv2 = MPConv(cout, cout, 3, **kw)
        self.shortcut = MPConv(cin, cout, **kw) if cin != cout else None
        self.attention = CosineAttention(cout, heads, attention_balance, **kw) if heads else None
        self.dropout = dropout
        self.encodes, self.takes_skip, self.balance, self.clip = encodes, takes_skip, residual_balance, clip
        self.resample = {"up": layers.upsample, "down": layers.downsample, None: lambda x: x}[resample]

    def __call__(self, x: jax.Array, emb_BxE: jax.Array, key: jax.Array | None) -> jax.Array:
        x = self.resample(x)
        narrow = self.shortcut or (lambda x: x)
        if self.encodes:
            x = normalize(narrow(x), (-1,))
        y = self.conv1(mp_silu(x))
        scale_BxC = 1 + self.embed(emb_BxE, self.embed_gain[...])
        y = mp_silu(y * scale_BxC[:, None, None].astype(y.dtype))
        y = self.conv2(norm.dropout(y, self.dropout, key))
        if not self.encodes:
            x = narrow(x)
        x = mp_sum(x, y, self.balance)
        if self.attention is not None:
            x = self.attention(x)
        return jnp.clip(x, -self.clip, self.clip) if self.clip else x


class EDM2(nnx.Module):
    """See `edm2` for the arguments."""

    def __init__(self, *, rngs: nnx.Rngs, in_channels, out_channels, channels, multipliers, noise_channels,
                 embedding_channels, blocks, attention_levels, label_balance, concat_balance, num_classes, null_label,
                 remat, dtype, constrain, **block_options):  # fmt: skip
        widths, emb, top = [channels * m for m in multipliers], embedding_channels, len(multipliers) - 1
        self.fourier = MPFourier(noise_channels, rngs=rngs)
        self.noise = MPConv(noise_channels, emb, rngs=rngs)
        self.label = MPConv(num_classes + null_label, emb, rngs=rngs) if num_classes else None

        def block(cin, cout, level, encodes, **options):
            options = {"attends": level in attention_levels, **options}
            return Block(cin, cout, emb, encodes=encodes, dtype=dtype, rngs=rngs, **options, **block_options)

        self.stem = MPConv(in_channels + 1, channels * multipliers[0], 3, dtype=dtype, rngs=rngs)
        width = widths[0]
        encoder, decoder, skips = [], [], [width]
        for level, next_width in enumerate(widths):
            if level:
                encoder.append(block(width, width, level, True, resample="down", attends=False))
                skips.append(width)
            for _ in range(blocks):
                encoder.append(block(width, next_width, level, True))
                width = next_width
                skips.append(width)
        for level, next_width in reversed(list(enumerate(widths))):
            if level == top:
                decoder += [block(width, width, level, False, attends=attends) for attends in (True, False)]
            else:
                decoder.append(block(width, width, level, False, resample="up", attends=False))
            for _ in range(blocks + 1):
                decoder.append(block(width + skips.pop(), next_width, level, False, takes_skip=True))
                width = next_width
        self.encoder, self.decoder = nnx.List(encoder), nnx.List(decoder)
        self.head = MPConv(width, out_channels, 3, rngs=rngs)
        self.head_gain = nnx.Param(jnp.zeros((), jnp.float32))
        self.label_balance, self.concat_balance, self.num_classes = label_balance, concat_balance, num_classes
        self.remat, self.constrain = remat, constrain

    def embedding(self, c_noise: jax.Array, cond: dict) -> jax.Array:
        """Noise level and label, [B] -> [B, E] float32."""
        e = self.noise(self.fourier(c_noise))
        if self.label is not None:
            label = cond.get("label", jnp.full(c_noise.shape, self.num_classes, jnp.int32))
            rows = self.label.kernel.shape[0]
            # One-hot vectors of unit variance; without a row of its own the null label is a vector of zeros.
            e = mp_sum(e, self.label(math.sqrt(rows) * jax.nn.one_hot(label, rows)), self.label_balance)
        return mp_silu(e)

    def __call__(self, x: jax.Array, c_noise: jax.Array, cond: dict, key: jax.Array | None) -> jax.Array:
        emb = self.embedding(c_noise, cond)
        calls = len(self.encoder) + len(self.decoder)
        run = layers.in_turn(emb, key, calls, remat=self.remat, constrain=self.constrain)
        h = jnp.concatenate([layers.with_image(x, cond), jnp.ones_like(x[..., :1])], axis=-1)
        h = self.constrain(self.stem(h))
        skips = [h]
        for module in self.encoder:
            h = run(module, h)
            skips.append(h)
        for module in self.decoder:
            if module.takes_skip:
                h = mp_concat(h, skips.pop(), self.concat_balance)
            h = run(module, h)
        return self.head(h, self.head_gain[...])


def edm2(
    shape: tuple[int, int, int],  # H, W, C of a sample
    *,
    channels: int = 192,  # width in units of which the levels are measured; WIDTHS has the published ones
    multipliers: Sequence[int] = (1, 2, 3, 4),  # width of each level
    noise_multiplier: int = 0,  # width of the noise level's Fourier features; 0: multipliers[0]
    embedding_multiplier: int = 0,  # width of the embedding; 0: the largest of `multipliers`
    blocks: int = 3,  # per level of the encoder (one more in the decoder)
    attention_levels: Sequence[int] = (2, 3),  # levels that attend, as the decoder's first block always does
    head_channels: int = 64,  # channels per attention head; levels narrower than that never attend
    dropout: float = 0.0,
    label_balance: float = 0.5,  # of noise level (0) and label (1) in the embedding
    concat_balance: float = 0.5,  # of main path (0) and skip connection (1)
    residual_balance: float = 0.3,  # of main path (0) and residual branch (1)
    attention_balance: float = 0.3,  # of main path (0) and attention (1)
    clip: float = 256.0,  # of activations after each block; 0: none
    num_classes: int = 0,  # 0: unconditional
    null_label: bool = True,  # "no label" has a vector of its own; False: it adds nothing (the original)
    cond_channels: int = 0,  # channels of cond["image"], concatenated to the input
    learn_variance: bool = False,  # twice the output channels
    remat: bool = False,  # recompute each block in the backward pass
    dtype: str = "float32",  # of matmuls and convolutions
    constrain: Callable[[jax.Array], jax.Array] = lambda x: x,  # sharding of activations, see placement.py
) -> Network:
    """EDM2's U-Net as a Network. Raises UserError where a size does not divide."""
    choose("model.dtype", dtype, ("float32", "bfloat16"))
    height, width, image_channels = shape
    stride = 2 ** (len(multipliers) - 1)
    if height % stride or width % stride:
        raise UserError(
            f"image size {height}x{width} does not divide by {stride}, which model.multipliers={tuple(multipliers)} "
            f"needs: use multiples of {stride} (data.size) or fewer levels"
        )
    if head_channels < 1:
        raise UserError(f"model.head_channels={head_channels} must be at least 1")
    levels = {*(l for l in attention_levels if l < len(multipliers)), len(multipliers) - 1}
    for c in sorted(channels * multipliers[l] for l in levels):
        if c > head_channels and c % (c // head_channels):
            raise UserError(
                f"the {c} channels of an attending level do not divide into {c // head_channels} heads, which "
                f"model.head_channels={head_channels} makes of them: choose a head_channels that divides {c}"
            )
    return from_module(
        lambda rngs: EDM2(
            rngs=rngs,
            in_channels=image_channels + cond_channels,
            out_channels=image_channels * (2 if learn_variance else 1),
            channels=channels,
            multipliers=tuple(multipliers),
            noise_channels=channels * (noise_multiplier or multipliers[0]),
            embedding_channels=channels * (embedding_multiplier or max(multipliers)),
            blocks=blocks,
            attention_levels=tuple(attention_levels),
            head_channels=head_channels,
            dropout=dropout,
            label_balance=label_balance,
            concat_balance=concat_balance,
            residual_balance=residual_balance,
            attention_balance=attention_balance,
            clip=clip,
            num_classes=num_classes,
            null_label=null_label,
            remat=remat,
            dtype=jnp.dtype(dtype),
            constrain=constrain,
        ),
        num_classes,
        project,
    )
