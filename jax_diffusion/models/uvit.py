"""U-ViT (Bao et al. 2023): a vision transformer with the long skip connections of a U-Net.

Everything is a token: the label, the time and the patches, with a learned position embedding. Of 2n + 1 blocks the
last n each take in what one of the first n gave, the nearest first, concatenated and projected (section 3.1):

    x <- W [x, skip];    x <- x + attention(norm(x));    x <- x + mlp(norm(x))

A 3x3 convolution may follow the last linear layer. Sizes in names: B batch, T tokens, D width.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from jax_diffusion.errors import UserError
from jax_diffusion.models import layers, transformer
from jax_diffusion.models.network import Network, from_module
from jax_diffusion.placement import UNCONSTRAINED, Constraint

small = nnx.initializers.normal(0.02)

# Table 1: width, blocks besides the middle one, heads.
SIZES = {"S": (512, 12, 8), "S-deep": (512, 16, 8), "M": (768, 16, 12), "L": (1024, 20, 16), "H": (1152, 28, 16)}
PRESETS = {f"{name}/{patch}": (*sizes, patch) for name, sizes in SIZES.items() for patch in (2, 4)}
sizes_of = functools.partial(transformer.sizes_of, PRESETS)


def uniform_of_inputs(key, shape, dtype=jnp.float32):
    """Uniform in +-1 / sqrt(inputs): what PyTorch starts convolutions with."""
    bound = 1 / math.sqrt(math.prod(shape[:-1]))
    return jax.random.uniform(key, shape, dtype, -bound, bound)


class Block(nnx.Module):
    """Attention and feed-forward network, pre-normalised, after the long skip connection where there is one."""

    def __init__(self, width, heads, hidden, *, qkv_bias, skip, dtype, rngs: nnx.Rngs):
        kw = {"init": small, "dtype": dtype, "rngs": rngs}
        self.skip = layers.dense(2 * width, width, **kw) if skip else None
        self.norm1 = transformer.layer_norm(width, eps=1e-5, rngs=rngs)
        self.attention = transformer.SelfAttention(width, heads, qkv_bias=qkv_bias, **kw)
        self.norm2 = transformer.layer_norm(width, eps=1e-5, rngs=rngs)
        self.mlp = transformer.FeedForward(width, hidden, tanh=False, **kw)

    def __call__(self, x: jax.Array, skip: jax.Array | None = None, constrain: Constraint = UNCONSTRAINED) -> jax.Array:
        if self.skip is not None:
            assert skip is not None
            x = self.skip(jnp.concatenate([x, skip], axis=-1))
        x = x + self.attention(self.norm1(x), constrain)
        return x + self.mlp(self.norm2(x), constrain)


class UViT(nnx.Module):
    """See `uvit` for the arguments."""

    def __init__(self, *, rngs: nnx.Rngs, shape, out_channels, width, depth, heads, patch, mlp_ratio, qkv_bias, skip,
                 time_mlp, conv, time_scale, time_offset, num_classes, null_label, cond_channels, remat, unroll, dtype,
                 constrain):  # fmt: skip
        kw = {"dtype": dtype, "rngs": rngs}

        def block(skip):
            return lambda rngs: Block(
                width, heads, round(width * mlp_ratio), qkv_bias=qkv_bias, skip=skip, dtype=dtype, rngs=rngs
            )

        patch_inputs = (shape[-1] + cond_channels) * patch**2
        self.patch_embed = layers.dense(patch_inputs, width, init=uniform_of_inputs, **kw)
        self.time1 = layers.dense(width, 4 * width, init=small, rngs=rngs) if time_mlp else None
        self.time2 = layers.dense(4 * width, width, init=small, rngs=rngs) if time_mlp else None
        normal = nnx.initializers.normal(1.0)
        # The extra row is the null label of classifier-free guidance.
        self.label = (
            nnx.Embed(num_classes + null_label, width, embedding_init=normal, rngs=rngs) if num_classes else None
        )
        self.extras = 2 if num_classes else 1
        tokens = self.extras + shape[0] * shape[1] // patch**2
        self.position = nnx.Param(small(rngs.params(), (tokens, width), jnp.float32))
        self.in_stack = transformer.stacked(block(False), depth // 2, rngs=rngs)
        self.middle = block(False)(rngs)
        # Kept in the order of the blocks whose outputs they take, which is the reverse of the order they run in.
        self.out_stack = transformer.stacked(block(skip), depth // 2, rngs=rngs)
        self.norm = transformer.layer_norm(width, eps=1e-5, rngs=rngs)
        self.head = layers.dense(width, out_channels * patch**2, init=small, rngs=rngs)
        self.conv = layers.conv(out_channels, out_channels, rngs=rngs) if conv else None
        self.shape, self.width, self.patch, self.num_classes = shape, width, patch, num_classes
        self.time_scale, self.time_offset = time_scale, time_offset
        self.remat, self.unroll, self.dtype, self.constrain = remat, unroll, dtype, constrain

    def tokens(self, x: jax.Array, c_noise: jax.Array, cond: dict) -> jax.Array:
        """Label, time and patches with their positions, [B, T, D]."""
        time = layers.sinusoidal_embedding(self.time_scale * c_noise + self.time_offset, self.width)
        if self.time1 is not None:
            assert self.time2 is not None
            time = self.time2(jax.nn.silu(self.time1(time)))
        parts = [time[:, None], self.patch_embed(transformer.patchify(x, self.patch))]
        if self.label is not None:
            parts.insert(0, layers.embed_label(self.label, cond, len(c_noise), self.num_classes)[:, None])
        h = jnp.concatenate([p.astype(jnp.float32) for p in parts], axis=1) + self.position[...][None]
        return h.astype(self.dtype)

    def __call__(self, x: jax.Array, c_noise: jax.Array, cond: dict, key: jax.Array | None) -> jax.Array:
        x = layers.with_image(x, cond)
        h = self.constrain(self.tokens(x, c_noise, cond))
        options = {"remat": self.remat, "unroll": self.unroll, "trains": key is not None}

        def give(block, h, _):
            h = self.constrain(block(self.constrain(h), constrain=self.constrain))
            return h, h

        def take(block, h, skip):
            return self.constrain(block(self.constrain(h), skip, self.constrain)), None

        h, skips = transformer.scan(give, self.in_stack, h, **options)
        h = self.constrain(self.middle(h, constrain=self.constrain))
        h, _ = transformer.scan(take, self.out_stack, h, skips, reverse=True, **options)
        out = self.head(self.norm(h)).astype(jnp.float32)[:, self.extras :]
        out = transformer.unpatchify(out, self.patch, *self.shape[:2])
        return out if self.conv is None else self.conv(out)


def uvit(
    shape: tuple[int, int, int],  # H, W, C of a sample
    *,
    size: str = "S/2",  # of the paper's table 1, "S/2" ... "H/4", for the four that are left 0; "" where all are given
    width: int = 0,
    depth: int = 0,  # blocks besides the middle one: an even number
    heads: int = 0,
    patch: int = 0,  # pixels a side of a token
    mlp_ratio: float = 4.0,  # hidden features of the feed-forward networks in units of `width`
    qkv_bias: bool = False,
    skip: bool = True,  # the long skip connections
    time_mlp: bool = False,  # two layers on the time embedding before it is a token
    conv: bool = True,  # a 3x3 convolution at the end; the paper's H has none
    time_scale: float = 1.0,  # the network is shown time_scale * c_noise + time_offset: the original counts
    time_offset: float = 0.0,  # discrete steps from 1 and continuous time to 999
    num_classes: int = 0,  # 0: unconditional
    null_label: bool = True,  # the label table has a row for "no label"; False: the label token is then 0
    learn_variance: bool = False,  # twice the output channels
    cond_channels: int = 0,  # channels of cond["image"], concatenated to the input
    remat: str = "none",  # in the backward pass: none; "dots" recomputes all but weight matmuls; "full" whole blocks
    unroll: int = 0,  # blocks a turn of each scan; 0: in training without remat all, else 1 (transformer.turn)
    dtype: str = "float32",  # of matmuls and of the residual stream
    constrain: Constraint = UNCONSTRAINED,  # sharding of activations, see placement.py
) -> Network:
    """The U-ViT as a Network. Raises UserError where a size is missing or does not divide."""
    n = transformer.resolve(PRESETS, size, (width, depth, heads, patch))
    transformer.check(shape, n, remat=remat, dtype=dtype, tensor=constrain.tensor)
    if n.depth % 2:
        raise UserError(
            f"model.depth={n.depth} is odd: half of the blocks, the middle one not counted, take in the rest"
        )
    return from_module(
        lambda rngs: UViT(
            rngs=rngs,
            shape=tuple(shape),
            out_channels=shape[-1] * (2 if learn_variance else 1),
            **n._asdict(),
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            skip=skip,
            time_mlp=time_mlp,
            conv=conv,
            time_scale=time_scale,
            time_offset=time_offset,
            num_classes=num_classes,
            null_label=null_label,
            cond_channels=cond_channels,
            remat=remat,
            unroll=unroll,
            dtype=jnp.dtype(dtype),
            constrain=constrain,
        ),
        num_classes,
    )
