"""What the transformers share: patches, attention, the feed-forward network, and a stack of blocks as one scan.

Tokens are [B, T, D]. LayerNorms, softmax and the conditioning are float32; the residual stream runs in `dtype`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_diffusion import lowering
from jax_diffusion.attention import attention, project_qkv
from jax_diffusion.errors import UserError, choose
from jax_diffusion.models import layers
from jax_diffusion.onednn import operations
from jax_diffusion.placement import UNCONSTRAINED, Constraint

# What the backward pass finds stored. "dots": the outputs of the matmuls with weights, of which there are few and
# which cost the most; attention and everything elementwise is computed again.
REMAT: dict[str, dict[str, Any] | None] = {
    "none": None,
    "full": {},
    "dots": {
        "policy": jax.checkpoint_policies.save_from_both_policies(
            jax.checkpoint_policies.dots_with_no_batch_dims_saveable, operations.saveable
        )
    },
}


def layer_norm(width: int, *, eps: float, affine: bool = True, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm in float32, its variance taken around the mean: streams of tokens drift far from zero."""
    return nnx.LayerNorm(
        width, epsilon=eps, use_scale=affine, use_bias=affine, use_fast_variance=False, dtype=jnp.float32, rngs=rngs
    )


class SelfAttention(nnx.Module):
    """Attention among all tokens, q, k and v from one matrix. [B, T, D] -> [B, T, D]."""

    def __init__(self, width: int, heads: int, *, qkv_bias: bool, init: Callable, dtype, rngs: nnx.Rngs):
        kw = {"init": init, "dtype": dtype, "rngs": rngs}
        self.qkv = layers.dense(width, 3 * width, bias=qkv_bias, **kw)
        self.out = layers.dense(width, width, **kw)
        self.heads = heads

    def __call__(self, x: jax.Array, constrain: Constraint = UNCONSTRAINED) -> jax.Array:
        b, t, d = x.shape
        q, k, v = project_qkv(self.qkv, x, self.heads) if constrain.tensor == 1 else self._by_heads(x, constrain)
        y = attention(q, k, v)
        return constrain.whole(self.out(constrain.features(y.reshape(b, t, d), 2)))

    def _by_heads(self, x: jax.Array, constrain: Constraint) -> Sequence[jax.Array]:
        """q, k and v, whose heads lie on several devices.

        The matrix is brought to its heads, not its outputs to theirs: they are many more. In two steps, each of which
        is one collective: gathered over fsdp, then from inputs to heads.
        """
        split = (3, self.heads, x.shape[-1] // self.heads)
        dtype = self.qkv.dtype or x.dtype
        kernel = constrain.weight(self.qkv.kernel[...].astype(dtype), 0)
        kernel = constrain.weight(constrain.weight(kernel.reshape(-1, *split), 0), 2)
        y = jnp.einsum("btd,dsnh->btsnh", x.astype(dtype), kernel)
        if self.qkv.bias is not None:
            y = y + constrain.weight(self.qkv.bias[...].astype(dtype).reshape(split), 1)[None, None]
        return [part[:, :, 0] for part in jax.lax.split(constrain.features(y, 3), (1, 1, 1), axis=2)]


def gelu(x: jax.Array, tanh: bool) -> jax.Array:
    """GELU, computed again in the backward pass: its gradient would keep three more arrays of this size."""
    return lowering.recomputed(functools.partial(jax.nn.gelu, approximate=tanh))(x)


class FeedForward(nnx.Module):
    """Two matrices with GELU between them, its tanh form where `tanh`."""

    def __init__(self, width: int, hidden: int, *, tanh: bool, init: Callable, dtype, rngs: nnx.Rngs):
        kw = {"init": init, "dtype": dtype, "rngs": rngs}
        self.up = layers.dense(width, hidden, **kw)
        self.down = layers.dense(hidden, width, **kw)
        self.tanh = tanh

    def __call__(self, x: jax.Array, constrain: Constraint = UNCONSTRAINED) -> jax.Array:
        hidden = constrain.features(self.up(x), 2)
        return constrain.whole(self.down(gelu(hidden, self.tanh)))


def stacked(make: Callable[[nnx.Rngs], nnx.Module], depth: int, *, rngs: nnx.Rngs) -> nnx.Module:
    """`depth` modules as one, whose parameters have a leading axis of layers: what `scan` runs.

    Name the attribute that holds it "stack" (or "..._stack"): sharding.py then leaves that axis whole.
    """
    graph, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

    def init(key):
        return nnx.to_pure_dict(nnx.state(make(nnx.Rngs(params=key)), nnx.Param))

    return nnx.merge(graph, jax.vmap(init)(jax.random.split(rngs.params(), depth)))


def scan(
    body: Callable[[nnx.Module, jax.Array, Any], tuple[jax.Array, Any]],
    stack: nnx.Module,
    x: jax.Array,
    xs: Any = None,
    *,
    reverse: bool = False,
    remat: str = "none",
    unroll: int = 0,
    trains: bool = False,
) -> tuple[jax.Array, Any]:
    """`x, y = body(block, x, x_i)` for each block of a stack: (the last x, the y's stacked).

    xs: what each block is given beside x, stacked.  reverse: the last block runs first.  remat: a name in REMAT.
    unroll: blocks a turn of the loop, which are compiled each by itself; 0: see `turn`.  trains: for a gradient.
    """
    graph, state = nnx.split(stack)
    layers = (nnx.to_pure_dict(state), xs)
    depth = len(jax.tree.leaves(layers)[0])
    unroll = min(unroll or turn(depth, remat, trains), depth)

    def step(x, layer):
        params, x_i = layer
        return body(nnx.merge(graph, params), x, x_i)

    options = REMAT[remat]
    if options is not None:
        # Between the turns of a loop XLA cannot undo it by finding the same thing computed before.
        step = jax.checkpoint(step, prevent_cse=unroll == depth, **options)
    return jax.lax.scan(step, x, layers, reverse=reverse, unroll=unroll)


def turn(depth: int, remat: str, trains: bool) -> int:
    """Blocks a turn of the loop where nobody says.

    In training all. What a loop keeps for the gradient it writes into stacks and reads from there, which takes more
    time and memory than the compilation of every block is worth (docs/benchmarks.md). With remat little is kept, and
    without a gradient nothing: then one, compiled once.
    """
    return depth if trains and remat == "none" else 1


def position_embedding(height: int, width: int, features: int) -> np.ndarray:
    """Fixed sines and cosines of each patch's column and row, [height width, features] float32.

    As in MAE (He et al. 2022): the first half of the features tells the column, the second the row, each as sines
    followed by cosines at features / 4 geometric frequencies from 1 to 1/10000.
    """
    frequencies = 10_000.0 ** (-np.arange(features // 4) / (features / 4))
    row, column = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    angles = [np.outer(position.ravel(), frequencies) for position in (column, row)]
    return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1).astype(np.float32)


def patchify(x: jax.Array, patch: int) -> jax.Array:
    """[B, H, W, C] -> [B, H W / p^2, p p C], row by row."""
    x = layers.space_to_depth(x, patch)
    return x.reshape(x.shape[0], -1, x.shape[-1])


def unpatchify(x: jax.Array, patch: int, height: int, width: int) -> jax.Array:
    """The inverse of patchify, for a picture of height x width pixels."""
    return layers.depth_to_space(x.reshape(x.shape[0], height // patch, width // patch, -1), patch)


class Sizes(NamedTuple):
    """What a published size stands for."""

    width: int
    depth: int
    heads: int
    patch: int


def resolve(presets: Mapping[str, tuple[int, ...]], size: str, given: Sequence[int]) -> Sizes:
    """The sizes `given`, those of the preset `size` where they are 0. UserError where neither says."""
    preset = presets[choose("model.size", size, presets)] if size else (0,) * 4
    sizes = Sizes(*(own or default for own, default in zip(given, preset, strict=True)))
    for name, value in sizes._asdict().items():
        if value < 1:
            raise UserError(f"model.{name}={value} must be at least 1: set it, or model.size to a published size")
    return sizes


def sizes_of(presets: Mapping[str, tuple[int, ...]], options: Mapping[str, Any]) -> Sizes:
    """The sizes that options of a transformer come to, for instance of a config's model group."""
    return resolve(presets, options.get("size", "S/2"), [options.get(name, 0) for name in Sizes._fields])


def check(shape: tuple[int, ...], sizes: Sizes, *, remat: str, dtype: str, tensor: int = 1) -> None:
    """Raises UserError unless a transformer of these sizes fits samples of `shape`, and its heads `tensor` devices."""
    choose("model.dtype", dtype, ("float32", "bfloat16"))
    choose("model.remat", remat, REMAT)
    if len(shape) != 3:
        raise UserError(f"a transformer needs samples [H, W, C], not of shape {shape}: use model=mlp")
    patch = sizes.patch
    if shape[0] % patch or shape[1] % patch:
        raise UserError(
            f"size {shape[0]}x{shape[1]} does not divide into patches of {patch}: use multiples of {patch} "
            "(data.size) or another model.patch"
        )
    if sizes.width % sizes.heads:
        raise UserError(f"model.heads={sizes.heads} does not divide model.width={sizes.width}")
    if sizes.heads % tensor:
        raise UserError(f"mesh.tensor={tensor} does not divide model.heads={sizes.heads}: use a divisor of it")
