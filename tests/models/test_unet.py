"""What the networks promise whatever their weights."""

import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_diffusion import config as configs
from jax_diffusion import models
from jax_diffusion.errors import UserError
from jax_diffusion.models.encoder import POOLS, encoder

SMALL = {"channels": 16, "multipliers": (1, 2), "blocks": 1, "attention_levels": (1,), "heads": 2}


def unet(shape=(8, 8, 3), **options):
    return models.make("unet", shape, **{**SMALL, **options})


def perturbed(network, seed=0):
    """Initial parameters with noise on every leaf, so that no branch is silent."""
    params = jax.jit(network.init)(jax.random.key(seed))
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    return tree.unflatten([p + 0.1 * rng.standard_normal(p.shape).astype(np.float32) for p in leaves])


def inputs(shape=(8, 8, 3), batch=4, seed=1):
    x = np.random.default_rng(seed).standard_normal((batch, *shape)).astype(np.float32)
    return jnp.asarray(x), jnp.linspace(1.0, 999.0, batch)


@pytest.fixture(scope="module")
def conditional():
    """A class-conditional network with dropout, compiled once: (network, params, apply)."""
    network = unet(dropout=0.3, num_classes=5)
    return network, perturbed(network), jax.jit(network.apply)


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_any_number_of_image_channels(channels):
    network = unet((8, 8, channels), learn_variance=channels == 2)
    params = jax.eval_shape(network.init, jax.random.key(0))
    x, t = inputs((8, 8, channels))
    out = jax.eval_shape(network.apply, params, x, t, {})
    assert out.shape == (4, 8, 8, channels * (2 if channels == 2 else 1)) and out.dtype == jnp.float32


def test_output_is_zero_at_initialisation(conditional):
    network, _, apply = conditional
    params = jax.jit(network.init)(jax.random.key(0))
    assert not np.any(apply(params, *inputs(), {}))


def test_mlp_output_is_zero_at_initialisation():
    network = models.make("mlp", (2,), width=16, depth=2, num_classes=3)
    x, t = inputs((2,))
    out = network.apply(network.init(jax.random.key(0)), x, t, {"label": jnp.array([0, 1, 2, 3])})
    assert out.shape == (4, 2) and not np.any(out)


def test_parameters_are_nested_dicts_of_float32_with_string_keys(conditional):
    def check(tree):
        if isinstance(tree, dict):
            assert tree and all(type(k) is str for k in tree)
            for v in tree.values():
                check(v)
        else:
            assert isinstance(tree, jax.Array) and tree.dtype == jnp.float32

    network, *_ = conditional
    params = jax.jit(network.init)(jax.random.key(0))
    check(params)
    assert network.parameter_count() == sum(p.size for p in jax.tree.leaves(params))


def test_initialisation_depends_on_the_key_alone(conditional):
    network, *_ = conditional
    init = jax.jit(network.init)
    a, b, c = (init(jax.random.key(s)) for s in (0, 0, 1))
    assert jax.tree.all(jax.tree.map(np.array_equal, a, b))
    assert not np.array_equal(a["stem"]["kernel"], c["stem"]["kernel"])


def test_dropout_is_decided_by_the_key(conditional):
    _, params, apply = conditional
    x, t = inputs()
    plain, again = apply(params, x, t, {}), apply(params, x, t, {})
    one, same, other = (apply(params, x, t, {}, key=jax.random.key(s)) for s in (1, 1, 2))
    np.testing.assert_array_equal(plain, again)
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - plain).max() > 1e-2 and np.abs(one - other).max() > 1e-2


def test_a_missing_label_is_the_null_label(conditional):
    network, params, apply = conditional
    x, t = inputs()
    null = apply(params, x, t, {"label": jnp.full(4, network.num_classes)})
    np.testing.assert_array_equal(apply(params, x, t, {}), null)
    assert np.abs(apply(params, x, t, {"label": jnp.full(4, 1)}) - null).max() > 1e-3


@pytest.mark.parametrize("channels", [8, 16, 32])
def test_a_narrow_network_sees_the_time(channels):
    """With 32 groups the norm after the added embedding would erase it from a level of 32 channels or less."""
    network = unet(channels=channels, multipliers=(1,), attention_levels=(), heads=1)
    params, (x, t) = perturbed(network), inputs()
    apply = jax.jit(network.apply)
    difference = np.linalg.norm(apply(params, x, t, {}) - apply(params, x, t[::-1], {}))
    assert difference > 0.05 * np.linalg.norm(apply(params, x, t, {}))


def test_samples_do_not_mix(conditional):
    _, params, apply = conditional
    x, t = inputs()
    changed = x.at[0].add(1.0)
    a, b = apply(params, x, t, {}), apply(params, changed, t, {})
    np.testing.assert_allclose(a[1:], b[1:], atol=1e-5)
    assert np.abs(a[0] - b[0]).max() > 1e-2


def test_remat_changes_neither_output_nor_gradient():
    options = {"dropout": 0.3, "multipliers": (1,), "attention_levels": ()}
    params, (x, t) = perturbed(unet(**options)), inputs()

    def run(network):
        def loss(params):
            out = network.apply(params, x, t, {}, key=jax.random.key(7))
            return jnp.mean(out**2), out

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    networks = [unet(**options, remat=remat) for remat in (False, True)]
    (g1, y1), (g2, y2) = map(run, networks)
    np.testing.assert_allclose(y1, y2, atol=1e-4 * np.abs(y1).max())
    norm = max(np.abs(g).max() for g in jax.tree.leaves(g1))
    assert norm > 1e-3
    for a, b in zip(jax.tree.leaves(g1), jax.tree.leaves(g2), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * norm)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32(conditional):
    _, params, apply = conditional
    x, t = inputs()
    network = unet(num_classes=5, dtype="bfloat16")
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    assert {a.dtype for a in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    out, reference = jax.jit(network.apply)(params, x, t, {}), apply(params, x, t, {})
    assert out.dtype == jnp.float32
    difference = np.linalg.norm(out - reference) / np.linalg.norm(reference)
    assert 1e-4 < difference < 0.1  # rounded to 8 bits somewhere, and not more than that


@pytest.mark.parametrize("embedding", ["sinusoidal", "fourier"])
def test_adm_blocks_and_the_time(embedding):
    network = unet(resblock_updown=True, scale_shift=True, time_embedding=embedding)
    params, (x, t) = perturbed(network), inputs()

    @jax.jit
    def run(params, t):
        def loss(params):
            out = network.apply(params, x, t, {})
            return jnp.mean(out**2), out

        return jax.grad(loss, has_aux=True)(params)

    gradients, out = run(params, t / 1000)
    assert np.abs(out - run(params, 1 - t / 1000)[1]).max() > 1e-3
    if embedding == "fourier":
        assert not np.any(gradients.pop("fourier")["frequencies"])
    for path, g in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.any(g), f"{jax.tree_util.keystr(path)} is never trained"


def test_an_image_as_condition_is_seen():
    network = unet((8, 8, 2), cond_channels=1, patch=2)
    params, (x, t) = perturbed(network), inputs((8, 8, 2))
    apply = jax.jit(network.apply)
    black, white = (apply(params, x, t, {"image": jnp.full((4, 8, 8, 1), v)}) for v in (-1.0, 1.0))
    assert black.shape == x.shape and np.abs(black - white).max() > 1e-2


@pytest.mark.parametrize(
    "shape, options, words",
    [
        ((10, 8, 3), {"multipliers": (1, 1, 1)}, ["10x8", "multiples of 4"]),
        ((8, 8, 3), {"patch": 8}, ["8x8", "model.patch=8", "multiples of 16"]),
        ((8, 8, 3), {"heads": 5}, ["model.heads=5", "32 channels"]),
        ((8, 8, 3), {"head_channels": 24}, ["model.head_channels=24", "32 channels"]),
        ((8, 8, 3), {"dtype": "float61"}, ["model.dtype='float61'", "bfloat16"]),
        ((8, 8, 3), {"time_embedding": "furrier"}, ["'furrier'", "did you mean 'fourier'?"]),
        ((8, 8, 3), {"head": 5}, ["'head'", "did you mean 'heads'?"]),
        ((8, 8, 3), {"multipliers": (0.3, 1)}, ["0.3 times model.channels=16"]),
        ((8, 8, 3), {"activation": "sillu"}, ["'sillu'", "did you mean 'silu'?"]),
        ((8, 8, 3), {"middle": "nothing"}, ["model.middle='nothing'", "none"]),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(shape, options, words):
    with pytest.raises(UserError) as error:
        unet(shape, **options)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_the_config_has_every_option():
    """And the default of each; what a config from before an option says of it is the same."""
    parameters = inspect.signature(models.unet).parameters.values()
    made = {"num_classes", "learn_variance", "constrain"}  # from other groups and the data
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in made}
    config = configs.default()
    assert {k: v for k, v in config.model.items() if k not in ("name", "uncertainty")} == defaults
    old = config.to_dict()
    for name in ("activation", "middle", "middle_scale", "resample_conv", "stem_channels", "frequency_shift"):
        del old["model"][name]
    assert configs.differences(configs.from_json(json.dumps(old)), config) == []


@pytest.mark.parametrize("pool", POOLS)
def test_a_classifier_gives_logits(pool):
    network = encoder((8, 16, 3), num_classes=7, pool=pool, channels=16, multipliers=(1, 2), attention_levels=(1,),
                      head_channels=8, dtype="bfloat16", remat=True, dropout=0.1)  # fmt: skip
    params, (x, t) = jax.eval_shape(network.init, jax.random.key(0)), inputs((8, 16, 3))
    out = jax.eval_shape(network.apply, params, x, t, {}, key=jax.random.key(0))
    assert out.shape == (4, 7) and out.dtype == jnp.float32
    assert {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_an_unknown_pool():
    with pytest.raises(UserError, match="did you mean 'spatial'"):
        encoder((8, 8, 3), num_classes=7, pool="spacial")


def test_an_unknown_network_is_named_with_its_neighbour():
    with pytest.raises(UserError, match=r"model\.name='unett' is unknown: did you mean 'unet'\?"):
        models.make("unett", (8, 8, 3))
