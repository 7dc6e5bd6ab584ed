"""The splash kernel beside XLA's attention, as far as it can be known without a TPU: interpreted, and lowered."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from jax_diffusion import attention, experiment, lowering, model, placement, sharding, solvers, streaming
from jax_diffusion import config as configs
from jax_diffusion.data import ArraySource
from jax_diffusion.plan import programs
from jax_diffusion.train import observe
from jax_diffusion.train.program import build
from jax_diffusion.train.setup import Setup


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


def lowered(traced, platform):
    """How many of Pallas' kernels are in it."""
    return traced.lower(lowering_platforms=(platform,)).as_text().count("tpu_custom_call")


def kernels(tokens, mesh=sharding.make_mesh, platform="tpu"):
    """Kernels in the program of attention and its gradient."""
    shape = jax.ShapeDtypeStruct((2, tokens, 2, 64), jnp.bfloat16)

    def total(q, k, v):
        return jnp.sum(attention.attention(q, k, v).astype(jnp.float32))

    with placement.tracing_for(mesh()) if mesh else contextlib.nullcontext(), lowering.compiling_for(platform):
        return lowered(jax.jit(jax.grad(total, (0, 1, 2))).trace(shape, shape, shape), platform)


def test_tpus_run_it_where_there_are_many_tokens():
    assert kernels(1024) == 3  # forward, of q, of k and v
    assert kernels(256) == kernels(1026) == 0  # few; no whole blocks of them
    assert kernels(1024, mesh=None) == 0  # who knows where they lie
    assert kernels(1024, mesh=lambda: jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))) == 0  # not of ours
    assert kernels(1024, platform="cpu") == 0
    with lowering.differentiable_forward():
        assert kernels(1024) == 0


@pytest.mark.parametrize("program", ["training", "validation", "sampling", "portions"])
def test_every_program_of_a_network_knows_its_mesh(program, monkeypatch, tmp_path):
    """Of a U-Net with attention over 32x32 pixels, on what passes for a TPU."""
    config = configs.default()
    config.model = configs.network("unet", channels=8, multipliers=(1,), blocks=1, attention_levels=(0,), norm_groups=4,
                                   dtype="bfloat16")  # fmt: skip
    config.train.batch_size = 2
    found, ask, compiling = [], attention._splash_takes, lowering.compiling_for
    monkeypatch.setattr(attention, "_splash_takes", lambda *a: found.append(ask(*a)) or found[-1])
    monkeypatch.setattr(lowering, "compiling_for", lambda platform: compiling("tpu"))
    shape = (32, 32, 1)
    if program == "training":
        _, traced = programs.train(config, shape, 10, sharding.make_mesh())
        assert lowered(traced, "tpu") >= 3
    elif program == "validation":
        built = build(config, shape, 10, sharding.make_mesh())
        state, shardings = built.create(jax.random.key(0))
        held_out = ArraySource(np.zeros((2, *shape), np.uint8), np.zeros(2, np.int32), name="black", num_classes=10)
        observe.Validator(Setup(config, tmp_path, held_out, held_out, (), built), shardings)(state.ema)
    else:
        parts = experiment.build(config, shape, 10)
        made = model.make(config, parts.network.init(jax.random.key(0)), shape, tuple("0123456789"), 0, parts)
        draw = {"sampling": made.sample, "portions": lambda *a: list(streaming.Stream(made)(*a))}[program]
        draw(jax.random.key(1), solvers.make("ddim", parts.process.schedule, 1), 1)
    assert found and all(found)


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
