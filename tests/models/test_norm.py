"""Norms as affine maps, dropout, and the lowerings that differ by platform, beside torch and by counting."""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx

from jax_diffusion import attention, lowering
from jax_diffusion.models import layers, norm

rng = np.random.default_rng(0)


def draw(*shape):
    return rng.standard_normal(shape).astype(np.float32)


def torch_norm(x, groups, scale, bias):
    args = (torch.tensor(v) for v in (scale, bias))
    return F.group_norm(torch.tensor(x.transpose(0, 3, 1, 2)), groups, *args, eps=1e-5).numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize("with_offset", [False, True])
def test_the_affine_form_is_the_norm_of_the_sum(with_offset):
    """Mean and variance of x + e from the sums of x alone."""
    x, offset = 3 + draw(2, 5, 7, 12), 2 * draw(2, 12)
    module = norm.GroupNorm(12, 4, 1e-5)
    module.scale[...], module.bias[...] = jnp.asarray(draw(12)), jnp.asarray(draw(12))
    a, b = module.affine(jnp.asarray(x), jnp.asarray(offset) if with_offset else None)
    shifted = x + offset[:, None, None] if with_offset else x
    theirs = torch_norm(shifted, 4, np.asarray(module.scale[...]), np.asarray(module.bias[...]))
    # float32 sums of squares of means of 3 lose a digit: 1e-5 of outputs up to 5.
    np.testing.assert_allclose(x * a[:, None, None] + b[:, None, None], theirs, atol=5e-5)


def test_a_norm_of_features_alone():
    x = draw(3, 8)
    theirs = F.group_norm(torch.tensor(x), 2).numpy()
    np.testing.assert_allclose(norm.GroupNorm(8, 2, 1e-5)(jnp.asarray(x)), theirs, atol=1e-5)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_activate_and_its_gradient(platform):
    """With and without recomputing: one value, one gradient, torch's."""
    x, w = draw(2, 4, 4, 8), draw(2, 4, 4, 8)
    module = norm.GroupNorm(8, 2, 1e-5)

    def loss(x):
        return jnp.sum(w * norm.activate(x, *module.affine(x)))

    with lowering.compiling_for(platform):
        jaxpr, backward = str(jax.make_jaxpr(loss)(x)), str(jax.make_jaxpr(jax.grad(loss))(x))
        value, gradient = jax.value_and_grad(loss)(jnp.asarray(x))
        _, along = jax.jvp(loss, (jnp.asarray(x),), (jnp.asarray(w),))  # solvers and likelihoods differentiate so
    assert ("checkpoint" in jaxpr or "remat" in jaxpr) == (platform == "cpu")
    # On TPU a gradient of its own, and nothing between the operations of a sampler.
    assert "optimization_barrier" not in jaxpr and ("optimization_barrier" in backward) == (platform == "tpu")
    np.testing.assert_allclose(along, np.vdot(gradient, w), rtol=1e-4)
    theirs = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    out = (F.silu(F.group_norm(theirs, 2)) * torch.tensor(w.transpose(0, 3, 1, 2))).sum()
    out.backward()
    np.testing.assert_allclose(value, out.item(), rtol=1e-4)
    np.testing.assert_allclose(gradient, theirs.grad.numpy().transpose(0, 2, 3, 1), atol=1e-5)


@pytest.mark.parametrize("rows", [200, 199])
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_keeps_its_share_and_the_mean(rate, rows):
    n = 1600 * rows
    x = jnp.ones((200, rows, 8))
    y = np.asarray(norm.dropout(x, rate, jax.random.key(1)))
    share = np.mean(y != 0)
    assert abs(share - (1 - rate)) < 5 * np.sqrt(rate * (1 - rate) / n)  # five standard deviations
    np.testing.assert_allclose(y[y != 0], 1 / norm.kept_share(rate))
    # Both halves of the words that were drawn, and neighbours, are independent.
    kept, half = (y != 0) - share, -(-rows // 2)
    for a, b in (
        (kept[:, : rows - half], kept[:, half:]),
        (kept[:, :-1], kept[:, 1:]),
        (kept[..., :-1], kept[..., 1:]),
    ):
        assert abs(np.mean(a * b)) < 5 * rate * (1 - rate) / np.sqrt(a.size)


def test_dropout_off():
    x = jnp.ones((2, 3))
    assert norm.dropout(x[0], 0.5, jax.random.key(0)).shape == (3,)
    assert norm.dropout(x, 0.5, None) is x and norm.dropout(x, 0.0, jax.random.key(0)) is x


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_convolution_of_the_upsampled(dtype):
    """By parity and plainly, value and gradients; the parities multiply 4/9 as much."""
    conv = layers.conv(6, 5, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    conv.bias[...] = jnp.asarray(draw(5))
    x = jnp.asarray(draw(2, 4, 3, 6))
    graph, params = nnx.split(conv)

    def ours(params, x):
        return jnp.sum(jnp.sin(layers.conv_of_upsampled(nnx.merge(graph, params), x).astype(jnp.float32)))

    def plain(params, x):
        return jnp.sum(jnp.sin(nnx.merge(graph, params)(layers.upsample(x)).astype(jnp.float32)))

    # bfloat16 rounds the sums of weights too: 2^-8 of each.
    tolerance = {"float32": 2e-5, "bfloat16": 0.1}[dtype]
    for a, b in zip(*(jax.tree.leaves(jax.value_and_grad(f, (0, 1))(params, x)) for f in (ours, plain)), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * max(1, float(jnp.abs(b).max())))
    flops = [jax.jit(f).lower(params, x).compile().cost_analysis()["flops"] for f in (ours, plain)]
    assert flops[0] < 0.7 * flops[1]


def test_forward_mode_goes_through_attention():
    q = jnp.asarray(draw(1, 4, 2, 8))
    with lowering.differentiable_forward():
        jaxpr = jax.make_jaxpr(lambda q: attention.attention(q, q, q))(q)
        _, tangent = jax.jvp(lambda q: attention.attention(q, q, q), (q,), (q,))
    assert "cudnn" not in str(jaxpr) and np.all(np.isfinite(tangent))


def test_options_that_xla_does_not_know_are_left_out(monkeypatch):
    assert lowering.compiler_options("cpu") == lowering._YNNPACK  # of every supported version
    monkeypatch.setattr(lowering, "_YNNPACK", {"xla_cpu_no_such_option": True})
    assert lowering.compiler_options("cpu") is None and lowering.compiler_options("tpu") is None
    assert lowering.jit(lambda x: x + 1)(1) == 2


def test_memory_is_kept_on_cpus_alone():
    assert not lowering.keep_memory("gpu")
    assert lowering.keep_memory("cpu") in (True, False)


def test_the_heap_is_in_huge_pages():
    enabled = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not enabled.exists() or "[never]" in enabled.read_text() or not lowering.keep_memory("cpu"):
        pytest.skip("this system offers none, or has another C library")
    script = """
import re
from jax_diffusion import lowering
lowering.keep_memory("cpu")
block = bytearray(b"1") * (64 << 20)
print(sum(int(kb) for kb in re.findall(r"AnonHugePages: +([0-9]+) kB", open("/proc/self/smaps").read())) >> 10)
"""
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert int(told) >= 48  # MiB of 64; a machine may be short of some
