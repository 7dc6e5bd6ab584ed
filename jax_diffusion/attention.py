"""Attention by the fastest implementation of the platform that a program is compiled for."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from jax_diffusion import lowering, placement, sharding
from jax_diffusion.onednn import operations

_cudnn = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")


def _cudnn_takes(query: tuple[int, ...], memory: tuple[int, ...], dtype) -> bool:
    """Whether JAX can trace cuDNN's attention of these shapes; what it takes is JAX's to know."""
    q, k = jax.ShapeDtypeStruct(query, dtype), jax.ShapeDtypeStruct(memory, dtype)
    try:
        jax.eval_shape(_cudnn, q, k, k)
    except (RuntimeError, NotImplementedError, ValueError):  # not installed; not of 16 bits, or the heads' width
        return False
    return True


# From so many tokens on, TPUs run the kernel that never stores the T x S weights: where it is said to pay; no TPU was
# at hand to measure it.
SPLASH_TOKENS = 1024


def attention(q_BxTxNxD: jax.Array, k_BxSxNxD: jax.Array, v_BxSxNxD: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(D)) v for each head, [B, T, N, D]; the softmax in float32.

    cuDNN's where the program is compiled for NVIDIA and it takes the shapes (bfloat16, heads of a multiple of 8), and
    the splash kernel where it is for TPU and there are many tokens: neither stores the T x S weights. On CPUs with the
    heads before the tokens; else XLA's. The splash kernel only within placement.tracing_for: XLA cannot cut it over
    devices by itself.
    """
    q, k, v = q_BxTxNxD, k_BxSxNxD, v_BxSxNxD
    if lowering.target() == "cpu":
        return _heads_first(q, k, v)
    fused = {}
    if lowering.target() == "tpu":
        mesh = placement.traced_mesh()
        if mesh is not None and _splash_takes(q, k, mesh):
            fused["tpu"] = functools.partial(splash, mesh=mesh)
    elif _cudnn_takes(q.shape, k.shape, q.dtype):
        fused["cuda"] = _cudnn
    if lowering.forward_mode() or not fused:
        return jax.nn.dot_product_attention(q, k, v)
    return jax.lax.platform_dependent(q, k, v, **fused, default=jax.nn.dot_product_attention)


def _splash_takes(q: jax.Array, k: jax.Array, mesh: AbstractMesh) -> bool:
    divides = q.shape[0] % sharding.batch_shards(mesh) == 0 == q.shape[2] % mesh.shape["tensor"]
    tokens = q.shape[1], k.shape[1]
    return divides and min(tokens) >= SPLASH_TOKENS and not any(n % _LANES for n in tokens)


_LANES = 128  # of a TPU's vector unit: blocks are multiples of it


def splash(
    q_BxTxNxD: jax.Array,
    k_BxSxNxD: jax.Array,
    v_BxSxNxD: jax.Array,
    mesh: Mesh | AbstractMesh | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attention by JAX's splash kernel for TPU (FlashAttention-2, Dao 2023, with the softmax in float32), on each
    device of `mesh` for its samples and heads. interpret: where there is no TPU, for tests."""
    heads = q_BxTxNxD.shape[2] // (1 if mesh is None else mesh.shape["tensor"])
    run = functools.partial(_splash_heads, heads=heads, interpret=interpret)
    if mesh is not None and mesh.size > 1:
        spec = PartitionSpec(sharding.BATCH, None, "tensor", None)
        run = jax.shard_map(run, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)
    return run(q_BxTxNxD, k_BxSxNxD, v_BxSxNxD)


def _splash_heads(q_BxTxNxD, k_BxSxNxD, v_BxSxNxD, *, heads: int, interpret: bool) -> jax.Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    (t, s), d = (q_BxTxNxD.shape[1], k_BxSxNxD.shape[1]), q_BxTxNxD.shape[3]
    rows, columns = (math.gcd(n, 512) for n in (t, s))
    sizes = kernels.BlockSizes(
        block_q=rows, block_kv=columns, block_q_dkv=rows, block_kv_dkv=columns, block_q_dq=rows, block_kv_dq=columns
    )
    mask = kernels.MultiHeadMask([kernels.FullMask((t, s))] * heads)
    one = kernels.make_splash_mha(mask, head_shards=1, q_seq_shards=1, block_sizes=sizes, interpret=interpret)
    q, k, v = (x.swapaxes(1, 2) for x in (q_BxTxNxD * d**-0.5, k_BxSxNxD, v_BxSxNxD))
    return jax.vmap(one)(q, k, v).swapaxes(1, 2)


def _heads_first(q_BxTxNxD: jax.Array, k_BxSxNxD: jax.Array, v_BxSxNxD: jax.Array) -> jax.Array:
    """On CPUs XLA's product over [B, T, N, D] is four copies and a product: here each operand is moved once."""
    q, k, v = q_BxTxNxD * q_BxTxNxD.shape[-1] ** -0.5, k_BxSxNxD, v_BxSxNxD
    if operations.multiplies(q, k, 2 * q.size * k.shape[1]):  # which reads them as they lie
        weights = jax.nn.softmax(operations.product(q, k, transpose_b=True, inside=(True, True, False)))
        return operations.product(weights, v, inside=(False, True, True))
    if q.shape[2] == 1:
        return _softmax_products(*(x[:, :, 0] for x in (q, k, v)))[:, :, None]
    return _softmax_products(*(x.swapaxes(1, 2) for x in (q, k, v))).swapaxes(1, 2)


def _softmax_products(q_xTxD: jax.Array, k_xSxD: jax.Array, v_xSxD: jax.Array) -> jax.Array:
    """softmax(q k^T) v over whatever axes come first; weights in float32."""
    logits = jnp.einsum("...td,...sd->...ts", q_xTxD, k_xSxD, preferred_element_type=jnp.float32)
    return jnp.einsum("...ts,...sd->...td", jax.nn.softmax(logits).astype(v_xSxD.dtype), v_xSxD)


def linear_attention(q_BxNxHxD: jax.Array, k_BxNxHxD: jax.Array, v_BxNxHxD: jax.Array) -> jax.Array:
    """(softmax_N(k)^T v)^T softmax_D(q) / sqrt(D), q times a D x D summary of all positions (Shen et al. 2021): linear
    in their number. k and v may be of more positions than q."""
    q, k, v = q_BxNxHxD, k_BxNxHxD, v_BxNxHxD
    dtype, scale = v.dtype, q.shape[-1] ** -0.5
    q = (jax.nn.softmax(q.astype(jnp.float32), axis=-1) * scale).astype(dtype)
    k = jax.nn.softmax(k.astype(jnp.float32), axis=1).astype(dtype)
    summary = jnp.einsum("bnhd,bnhe->bhde", k, v, preferred_element_type=jnp.float32)
    return jnp.einsum("bnhd,bhde->bnhe", q, summary.astype(dtype), preferred_element_type=jnp.float32).astype(dtype)


def split_qkv(qkv_BxTx3ND: jax.Array, heads: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q, k and v, [B, T, N, D] each, of what one matrix has made: all of q, then k, then v.

    Cut before there is an axis of heads, so that each lies in memory as it will be used: TPUs would copy all three
    otherwise. By lax.split, whose gradient puts them together in one copy; that of indexing pads each and adds.
    """
    return _by_heads(_thirds(qkv_BxTx3ND), heads)


def _thirds(x: jax.Array) -> Sequence[jax.Array]:
    """Of the last axis."""
    return jax.lax.split(x, (x.shape[-1] // 3,) * 3, axis=x.ndim - 1)


def _by_heads(qkv: Sequence[jax.Array], heads: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    q, k, v = (part.reshape(*part.shape[:2], heads, -1) for part in qkv)
    return q, k, v


def project_qkv(qkv: nnx.Linear, x_BxTxC: jax.Array, heads: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q, k and v, [B, T, N, D] each: split_qkv(qkv(x), heads).

    For TPU with a product for each third of the matrix. The gradient of the split puts three arrays together, for which
    its compiler copies all of it once more: 10 % of the cycles of a block of attention or of DiT-S/2's whole step on
    v5e. On NVIDIA one product is better, by 4 % of DiT-S/2's traffic on an H100.
    """
    if lowering.target() != "tpu":
        return split_qkv(qkv(x_BxTxC), heads)
    dtype = qkv.dtype or x_BxTxC.dtype
    parts = [x_BxTxC.astype(dtype) @ kernel for kernel in _thirds(qkv.kernel[...].astype(dtype))]
    if qkv.bias is not None:
        biases = _thirds(qkv.bias[...].astype(dtype))
        parts = [y + bias[None, None] for y, bias in zip(parts, biases, strict=True)]
    return _by_heads(parts, heads)
