"""Weights in bfloat16: rounded once they give the very numbers that rounding them at each use gives."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_diffusion import config as configs
from jax_diffusion import experiment, precision, solvers
from jax_diffusion import model as models
from jax_diffusion.errors import UserError

KEY = jax.random.key(1)
UNET = {"channels": 8, "blocks": 1, "multipliers": (1, 2), "heads": 2}
DIT = {"size": "", "width": 32, "depth": 3, "heads": 2, "patch": 2}


def make(name, **options):
    config = configs.default()
    config.unlock()
    config.model = configs.network(name, **options)
    shape = (2,) if name == "mlp" else (8, 8, 1)
    parts = experiment.build(config, shape, 3)
    leaves, tree = jax.tree.flatten(jax.eval_shape(parts.network.init, KEY))
    rng = np.random.default_rng(0)
    params = tree.unflatten([np.float32(0.2 * rng.standard_normal(x.shape)) for x in leaves])
    return models.make(config, params, shape, ("a", "b", "c"), 0, parts)


def names(params, dtype):
    return {jax.tree_util.keystr(path) for path, leaf in jax.tree_util.tree_leaves_with_path(params)
            if leaf.dtype == dtype}  # fmt: skip


@pytest.mark.parametrize("name, options", [("unet", UNET), ("dit", DIT)])
def test_the_same_samples_from_half_the_bytes(name, options):
    model = make(name, **options)
    half = model.cast("bfloat16")
    table = solvers.make("ddim", model.process.schedule, 3)
    samples = half.sample(KEY, table, 3, labels=[0, 1, 2])
    rounded_at_use = dataclasses.replace(half, params=model.params)
    np.testing.assert_array_equal(samples, rounded_at_use.sample(KEY, table, 3, labels=[0, 1, 2]))
    apart = np.abs(samples - model.sample(KEY, table, 3, labels=[0, 1, 2]))
    assert samples.dtype == np.float32 and apart.max() > 1e-5 and apart.mean() < 0.02
    # Every kernel between the stem and the head, and nothing of norms, times and labels.
    whole, rounded = names(half.params, jnp.float32), names(half.params, jnp.bfloat16)
    assert len(rounded) > 10 and any(re.search("norm.*scale", n) for n in whole) == (name == "unet")
    assert not [n for n in rounded if re.search("norm|time|label|head", n)]
    assert not [n for n in whole if "kernel" in n and not re.search("time|head", n)]


def test_nothing_is_rounded_in_the_loop():
    half = make("dit", **DIT).cast("bfloat16")
    table = solvers.make("ddim", half.process.schedule, 3)
    samples, shared = half.request(2, [1], None, 1.0, None, None, None)
    settings = {"shape": half.shape, "clip": True, "trajectory": False, "weak": None}

    def converted(params):
        """Sizes of what the program rounds to bfloat16."""
        lowered = half.generate.lower(params, KEY, table, np.arange(2), samples, shared, {}, **settings)
        found = re.findall(r"stablehlo.convert .*: \(tensor<([\dx]+)xf32>\) -> tensor<[\dx]+xbf16>", lowered.as_text())
        return {tuple(map(int, s.split("x"))) for s in found}

    kernels = {(32, 32), (32, 96), (32, 128), (128, 32), (32, 192)}
    assert kernels <= converted(jax.tree.map(lambda p: p.astype(jnp.float32), half.params))
    assert not kernels & converted(half.params)


def test_back_again_and_where_there_is_no_choice():
    model = make("unet", **UNET)
    same = model.cast("bfloat16").cast("float32")
    assert same.config.model.dtype == "float32"
    with pytest.raises(UserError, match="mlp"):
        make("mlp").cast("bfloat16")
    with pytest.raises(UserError, match="float64"):
        model.cast("float64")


def test_only_what_is_always_rounded_is():
    bf16 = jnp.bfloat16

    def f(always, moved, scanned, carried, also, returned, unused, other):
        layers = jax.lax.scan(lambda h, w: (h + w.astype(bf16), None), always.astype(bf16), scanned)[0]
        end = jax.lax.fori_loop(0, 3, lambda i, h: h * 2, carried).astype(bf16)
        chosen = jax.lax.cond(other[0] > 0, lambda m: m.astype(bf16), lambda m: -m.astype(bf16), moved.reshape(2, 2)[0])
        return layers.sum() + end.sum() + also.sum() + also.astype(bf16).sum(), chosen, returned

    ones = jnp.ones(4)
    jaxpr = jax.make_jaxpr(f)(ones, ones, jnp.ones((3, 4)), ones, ones, ones, ones, ones)
    assert precision.only_converted(jaxpr, bf16) == [True, True, True, False, False, False, False, False]
