"""The splash kernel beside XLA's attention, as far as it can be known without a TPU: interpreted, and lowered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_diffusion import attention, lowering
from jax_diffusion.sharding import UNCONSTRAINED, Constraint


def draw(dtype, tokens=256, memory=256):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((2, n, 2, 64) for n in (tokens, memory, memory, tokens))
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


# float32: the order of sums. bfloat16: q is scaled and the weights are rounded in another place, to 8 bits each.
@pytest.mark.parametrize(
    "dtype, tolerance, memory", [("float32", 2e-6, 256), ("float32", 2e-6, 384), ("bfloat16", 2e-2, 256)]
)
def test_splash_is_xlas_attention_both_ways(dtype, tolerance, memory):
    *qkv, gradient = draw(jnp.dtype(dtype), memory=memory)

    def both(f):
        y, back = jax.vjp(f, *qkv)
        return [np.asarray(a, np.float32) for a in (y, *back(gradient))]

    ours = both(lambda *a: attention.splash(*a, interpret=True))
    for a, b in zip(ours, both(jax.nn.dot_product_attention), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


PLACED = Constraint()  # of one device


def kernels(tokens, constrain=PLACED, platform="tpu"):
    """Kernels in the program of attention and its gradient."""
    shape = jax.ShapeDtypeStruct((2, tokens, 2, 64), jnp.bfloat16)

    def total(q, k, v):
        return jnp.sum(attention.attention(q, k, v, constrain).astype(jnp.float32))

    with lowering.compiling_for(platform):
        traced = jax.jit(jax.grad(total, (0, 1, 2))).trace(shape, shape, shape)
        return traced.lower(lowering_platforms=(platform,)).as_text().count("tpu_custom_call")


def test_tpus_run_it_where_there_are_many_tokens():
    assert kernels(1024) == 3  # forward, of q, of k and v
    assert kernels(256) == kernels(1026) == 0  # few; no whole blocks of them
    assert kernels(1024, UNCONSTRAINED) == 0  # who knows where they lie
    assert kernels(1024, platform="cpu") == 0
    with lowering.differentiable_forward():
        assert kernels(1024) == 0


@pytest.mark.parametrize("bias", [True, False])
def test_q_k_and_v_are_the_same_for_every_platform(bias):
    """One product or three, values and gradients."""
    linear = nnx.Linear(12, 24, use_bias=bias, rngs=nnx.Rngs(0))
    if bias:
        linear.bias[...] = jax.random.normal(jax.random.key(1), (24,))
    graph, params = nnx.split(linear)
    x = jax.random.normal(jax.random.key(2), (2, 5, 12))

    def total(params, x):
        parts = attention.project_qkv(nnx.merge(graph, params), x, 2)
        return sum(jnp.sum(jnp.sin((i + 1) * part)) for i, part in enumerate(parts))

    found = {}
    for platform in ("cpu", "tpu"):
        with lowering.compiling_for(platform):
            found[platform] = jax.tree.leaves(jax.value_and_grad(total, (0, 1))(params, x))
            products = str(jax.make_jaxpr(functools.partial(total, params))(x)).count("dot_general")
            assert products == (3 if platform == "tpu" else 1)
    for a, b in zip(found["cpu"], found["tpu"], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())  # the order of sums
