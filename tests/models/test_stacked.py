"""The layers of a scan: their leading axis counts layers, for sharding and for weight decay; how many run in a turn."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_diffusion import config as configs
from jax_diffusion import models, sharding
from jax_diffusion.train import optim

SIZES = [("dit", f"{s}/{p}") for s in ("S", "B", "L", "XL") for p in (2, 8)] + [("uvit", f"{s}/2") for s in "SMLH"]


def specs(network, fsdp):
    """(path, shape, spec) of the leaves of the first moments."""
    moments = {"opt_state": [{"mu": jax.eval_shape(network.init, jax.random.key(0))}]}
    for path, leaf in jax.tree_util.tree_leaves_with_path(moments):
        yield path, leaf, sharding.spec_of(sharding.path_name(path), leaf.shape, mesh(fsdp), sharding.DEFAULT_RULES)


def mesh(fsdp):
    return SimpleNamespace(shape={"data": 1, "fsdp": fsdp, "tensor": 1})


@pytest.mark.parametrize("name, size", SIZES)
def test_layers_are_never_cut(name, size):
    network = models.make(name, (32, 32, 4), size=size, num_classes=1000)
    for fsdp in (2, 3, 4, 6, 7, 8, 12, 14, 16, 24, 28):
        named = ((sharding.path_name(path), leaf, spec) for path, leaf, spec in specs(network, fsdp))
        stacked = [(name, leaf, spec) for name, leaf, spec in named if "stack/" in name]
        assert len(stacked) >= 10 and not [item for item in stacked if item[2] and item[2][0] is not None]
        if fsdp in (2, 4, 8, 16):  # and yet cut, but for the bias of q, k and v
            whole = [name for name, leaf, spec in stacked if spec != (None,) * leaf.ndim and "fsdp" not in spec]
            assert all(name.endswith("attention/qkv/bias") for name in whole)


def test_what_would_be_cut():
    """24 layers of 1024 features divide by 3 along the layers alone."""
    rules, shape = sharding.DEFAULT_RULES, (24, 1024, 1024)
    assert sharding.spec_of("params/kernel", shape, mesh(3), rules)[0] == "fsdp"
    assert not sharding.spec_of("params/stack/kernel", shape, mesh(3), rules)


def test_others_are_cut_as_before():
    for name in ("params/stacks/0/kernel", "params/haystack", "params/down/0/kernel"):
        assert sharding.spec_of(name, (8, 4), mesh(4), sharding.DEFAULT_RULES) == sharding.PartitionSpec("fsdp")
    spec = sharding.spec_of("params/out_stack/skip/kernel", (8, 4), mesh(4), sharding.DEFAULT_RULES)
    assert spec == sharding.PartitionSpec(None, "fsdp")


def test_weight_decay_spares_stacked_biases_and_norms():
    """Without a gradient AdamW moves what decays alone: matrices, whether one or one a layer."""
    network = models.make("uvit", (4, 4, 1), size="", width=8, depth=4, heads=1, patch=2, qkv_bias=True)
    params = jax.tree.map(lambda s: np.ones(s.shape, np.float32), jax.eval_shape(network.init, jax.random.key(0)))
    optimizer, _ = optim.make(configs.override(configs.default(), ["--config.optim.weight_decay=0.5"]).optim, 10)
    still = jax.tree.map(np.zeros_like, params)
    updates = jax.jit(lambda p: optimizer.update(still, optimizer.init(p), p)[0])(params)
    moved = {sharding.path_name(path) for path, u in jax.tree_util.tree_leaves_with_path(updates) if np.any(u)}
    paths = {sharding.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    assert moved == {p for p in paths if p.endswith("kernel")} | {"position"}
    assert "out_stack/skip/kernel" in moved and "in_stack/norm1/scale" in paths


def small(name, **options):
    return models.make(name, (4, 4, 1), size="", width=16, depth=4, heads=2, patch=2, **options)


def loss(network, key=None):
    return lambda params: jnp.sum(network.apply(params, jnp.ones((2, 4, 4, 1)), jnp.ones(2), key=key) ** 2)


def turns(network, key, function=jax.grad):
    """Layers of each loop of the program, and those in one turn of it."""
    params = jax.eval_shape(network.init, jax.random.key(0))
    jaxpr = jax.make_jaxpr(function(loss(network, key)))(params)
    return {(e.params["length"], e.params["unroll"]) for e in jaxpr.eqns if e.primitive.name == "scan"}


@pytest.mark.parametrize("name, length", [("dit", 4), ("uvit", 2)])
def test_layers_are_all_in_one_turn_where_they_would_leave_stacks_for_the_gradient(name, length):
    key = jax.random.key(1)
    assert turns(small(name), key) == {(length, length)}
    assert turns(small(name), None, lambda f: f) == {(length, 1)}  # sampling
    assert turns(small(name, remat="full"), key) == turns(small(name, remat="dots"), key) == {(length, 1)}
    assert turns(small(name, unroll=1), key) == {(length, 1)}
    assert turns(small(name, unroll=99, remat="full"), key) == {(length, length)}


@pytest.mark.parametrize("name", ["dit", "uvit"])
def test_the_gradient_does_not_know_how_many_layers_a_turn_has(name):
    key = jax.random.key(1)
    params = small(name).init(jax.random.key(0))
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape), params)  # no zeros
    once = jax.jit(jax.grad(loss(small(name, unroll=1), key)))(params)
    for options in ({}, {"unroll": 2}, {"unroll": 4, "remat": "full"}):
        other = jax.jit(jax.grad(loss(small(name, **options), key)))(params)
        for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(other), strict=True):
            # The order of sums is XLA's: a few roundings of float32.
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(a).max())


def test_remat_in_one_turn_computes_again():
    """Outside of a loop XLA would find what it computed before, and keep it."""
    params = small("dit").init(jax.random.key(0))

    def tanh(**options):
        network = small("dit", unroll=4, **options)
        text = jax.jit(jax.grad(loss(network, jax.random.key(1)))).lower(params).compile().as_text()
        return text.count(" exponential(") + text.count(" tanh(")

    assert tanh(remat="full") > tanh()
