"""The diffusion transformer, DiT (Peebles & Xie 2023), and SiT (Ma et al. 2024), the same network on flows.

Patches become tokens with a fixed position embedding; time and label become one vector c, from which each block takes
the shift, scale and gate of its two branches (adaLN-Zero, section 3.2): with gates of zero every block starts as the
identity.

    x <- x + gate_1(c) attention((1 + scale_1(c)) norm(x) + shift_1(c))
    x <- x + gate_2(c) mlp((1 + scale_2(c)) norm(x) + shift_2(c))

Sizes in names: B batch, T tokens, D width.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jax_diffusion import lowering
from jax_diffusion.errors import UserError
from jax_diffusion.models import layers, transformer
from jax_diffusion.models.network import Network, from_module, run_inner
from jax_diffusion.placement import UNCONSTRAINED, Constraint

xavier, small, zeros = nnx.initializers.xavier_uniform(), nnx.initializers.normal(0.02), layers.zeros_init()

# Table 1: width, depth, heads.
SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
PRESETS = {f"{name}/{patch}": (*sizes, patch) for name, sizes in SIZES.items() for patch in (2, 4, 8)}
sizes_of = functools.partial(transformer.sizes_of, PRESETS)


def modulate(norm: Callable, x_BxTxD: jax.Array, shift_BxD: jax.Array, scale_BxD: jax.Array) -> jax.Array:
    """norm(x) (1 + scale) + shift, on CPUs and GPUs computed again in the backward pass."""

    def modulated(x, shift, scale):
        return norm(x) * (1 + scale[:, None]) + shift[:, None]

    if lowering.target() != "tpu":  # whose compiler does so by itself, and better: docs/benchmarks.md
        modulated = lowering.recomputed(modulated)
    return modulated(x_BxTxD, shift_BxD, scale_BxD)


class Block(nnx.Module):
    """Attention and feed-forward network under adaLN-Zero."""

    def __init__(self, width, heads, hidden, *, qkv_bias, mlp_norm_eps, dtype, rngs: nnx.Rngs):
        kw = {"dtype": dtype, "rngs": rngs}
        self.modulation = layers.dense(width, 6 * width, init=zeros, **kw)
        self.norm1 = transformer.layer_norm(width, eps=1e-6, affine=False, rngs=rngs)
        self.attention = transformer.SelfAttention(width, heads, qkv_bias=qkv_bias, init=xavier, **kw)
        self.norm2 = transformer.layer_norm(width, eps=mlp_norm_eps, affine=False, rngs=rngs)
        self.mlp = transformer.FeedForward(width, hidden, tanh=True, init=xavier, **kw)

    def __call__(self, x: jax.Array, c_BxD: jax.Array, constrain: Constraint = UNCONSTRAINED) -> jax.Array:
        signals = constrain.whole(self.modulation(jax.nn.silu(c_BxD))).astype(jnp.float32)
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(signals, 6, axis=-1)
        h = self.attention(modulate(self.norm1, x, shift1, scale1), constrain)
        x = x + (gate1[:, None] * h).astype(x.dtype)
        h = self.mlp(modulate(self.norm2, x, shift2, scale2), constrain)
        return x + (gate2[:, None] * h).astype(x.dtype)


class DiT(nnx.Module):
    """See `dit` for the arguments."""

    def __init__(self, *, rngs: nnx.Rngs, shape, out_channels, spare_channels, width, depth, heads, patch, mlp_ratio,
                 qkv_bias, mlp_norm_eps, frequency_shift, flow_to_data, num_classes, null_label, cond_channels, remat,
                 unroll, dtype, constrain):  # fmt: skip
        kw = {"dtype": dtype, "rngs": rngs}
        self.patch_embed = layers.dense((shape[-1] + cond_channels) * patch**2, width, init=xavier, **kw)
        self.time1 = layers.dense(256, width, init=small, rngs=rngs)
        self.time2 = layers.dense(width, width, init=small, rngs=rngs)
        # The extra row is the null label of classifier-free guidance.
        self.label = (
            nnx.Embed(num_classes + null_label, width, embedding_init=small, rngs=rngs) if num_classes else None
        )
        hidden = round(width * mlp_ratio)
        self.stack = transformer.stacked(
            lambda rngs: Block(
                width, heads, hidden, qkv_bias=qkv_bias, mlp_norm_eps=mlp_norm_eps, dtype=dtype, rngs=rngs
            ),
            depth,
            rngs=rngs,
        )
        self.norm = transformer.layer_norm(width, eps=1e-6, affine=False, rngs=rngs)
        self.modulation = layers.dense(width, 2 * width, init=zeros, **kw)
        self.head = layers.dense(width, (out_channels + spare_channels) * patch**2, init=zeros, rngs=rngs)
        self.shape, self.out_channels, self.width, self.patch = shape, out_channels, width, patch
        self.num_classes, self.frequency_shift, self.flow_to_data = num_classes, frequency_shift, flow_to_data
        self.remat, self.unroll, self.dtype, self.constrain, self.depth = remat, unroll, dtype, constrain, depth

    def conditioning(self, c_noise: jax.Array, cond: dict) -> jax.Array:
        """Time and label, [B] -> [B, D] float32."""
        t = 1 - c_noise / 1000 if self.flow_to_data else c_noise
        c = layers.sinusoidal_embedding(t, 256, shift=self.frequency_shift)
        c = self.time2(jax.nn.silu(self.time1(c)))
        if self.label is not None:
            c = c + layers.embed_label(self.label, cond, len(c_noise), self.num_classes)
        return c

    def blocks(self, h: jax.Array, c: jax.Array, first: int, end: int, trains: bool = False) -> jax.Array:
        """Blocks first .. end - 1 of the stack."""

        def body(block, h, _):
            return self.constrain(block(self.constrain(h), c, self.constrain)), None

        if (first, end) == (0, self.depth):
            return transformer.scan(body, self.stack, h, remat=self.remat, unroll=self.unroll, trains=trains)[0]
        graph, state = nnx.split(self.stack)
        pure = nnx.to_pure_dict(state)

        # Taken one by one: a slice of the stack would be copied at every evaluation.
        def step(h, i):
            params = jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, i, keepdims=False), pure)
            return body(nnx.merge(graph, params), h, None)

        return jax.lax.scan(step, h, jnp.arange(first, end))[0]

    def __call__(
        self,
        x: jax.Array,
        c_noise: jax.Array,
        cond: dict,
        key: jax.Array | None,
        depth: int = 0,  # blocks at either end that are outer layers
        inner: Callable = run_inner,
    ) -> jax.Array:
        height, width, _ = self.shape
        c = self.constrain(self.conditioning(c_noise, cond))
        x = layers.with_image(x, cond)
        position = transformer.position_embedding(height // self.patch, width // self.patch, self.width)
        h = self.patch_embed(transformer.patchify(x, self.patch)) + position[None]
        h = self.constrain(h.astype(self.dtype))
        if depth:
            h = self.blocks(h, c, 0, depth)

            def residual(h):
                """What the inner blocks add. In float32, where the sum is the stream they leave, to its last bit."""
                after = self.blocks(h, c, depth, self.depth - depth)
                return after.astype(jnp.float32) - h.astype(jnp.float32)

            h = (h + inner(residual, h)).astype(self.dtype)
            h = self.blocks(h, c, self.depth - depth, self.depth)
        else:
            h = self.blocks(h, c, 0, self.depth, trains=key is not None)
        shift, scale = jnp.split(self.modulation(jax.nn.silu(c)).astype(jnp.float32), 2, axis=-1)
        h = self.head(modulate(self.norm, h, shift, scale)).astype(jnp.float32)
        out = transformer.unpatchify(h, self.patch, height, width)[..., : self.out_channels]
        return -out if self.flow_to_data else out


def dit(
    shape: tuple[int, int, int],  # H, W, C of a sample
    *,
    size: str = "S/2",  # of the paper's table 1, "S/2" ... "XL/8", for the four that are left 0; "" where all are given
    width: int = 0,
    depth: int = 0,  # blocks
    heads: int = 0,
    patch: int = 0,  # pixels a side of a token
    mlp_ratio: float = 4.0,  # hidden features of the feed-forward networks in units of `width`
    qkv_bias: bool = True,
    mlp_norm_eps: float = 1e-6,  # of the feed-forward branch's LayerNorm; diffusers has 1e-5
    frequency_shift: float = 0.0,  # of the time embedding's frequencies; diffusers has 1
    flow_to_data: bool = False,  # the network counts time from noise to data and predicts x0 - eps (SiT)
    spare_channels: int = 0,  # of the head, that are kept and never returned (SiT's learned sigma)
    num_classes: int = 0,  # 0: unconditional
    null_label: bool = True,  # the label table has a row for "no label"; False: no label adds nothing
    learn_variance: bool = False,  # twice the output channels
    cond_channels: int = 0,  # channels of cond["image"], concatenated to the input
    remat: str = "none",  # in the backward pass: none; "dots" recomputes all but weight matmuls; "full" whole blocks
    unroll: int = 0,  # blocks a turn of the scan; 0: in training without remat all, else 1 (transformer.turn)
    dtype: str = "float32",  # of matmuls and of the residual stream
    constrain: Constraint = UNCONSTRAINED,  # sharding of activations, see placement.py
) -> Network:
    """The DiT as a Network. Raises UserError where a size is missing or does not divide.

    flow_to_data: SiT moves from noise at t = 0 to data at 1 and learns v = x0 - eps. Schedule "flow" and prediction
        "flow" count the other way and learn eps - x0, with c_noise = 1000 t: the network is shown 1 - c_noise / 1000
        and its output is negated, so that SiT's own weights run as they are.
    """
    n = transformer.resolve(PRESETS, size, (width, depth, heads, patch))
    transformer.check(shape, n, remat=remat, dtype=dtype, tensor=constrain.tensor)
    if n.width % 4:
        raise UserError(f"model.width={n.width} does not divide by 4, which the position embedding needs")
    return from_module(
        lambda rngs: DiT(
            rngs=rngs,
            shape=tuple(shape),
            out_channels=shape[-1] * (2 if learn_variance else 1),
            spare_channels=spare_channels,
            **n._asdict(),
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            mlp_norm_eps=mlp_norm_eps,
            frequency_shift=frequency_shift,
            flow_to_data=flow_to_data,
            num_classes=num_classes,
            null_label=null_label,
            cond_channels=cond_channels,
            remat=remat,
            unroll=unroll,
            dtype=jnp.dtype(dtype),
            constrain=constrain,
        ),
        num_classes,
        depths=(n.depth - 1) // 2,
    )
