"""Conditioning on an image: what the network is shown, training with it, sampling from it, and runs from before."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from jax_diffusion import conditions, data, experiment, process, schedules, timesteps
from jax_diffusion import config as configs
from jax_diffusion import model as models
from jax_diffusion.errors import UserError
from jax_diffusion.models import Network
from jax_diffusion.train import setup, state
from jax_diffusion.train.step import make_train_step

PHOTOS = np.random.default_rng(0).uniform(-1, 1, (3, 16, 8, 3)).astype(np.float32)


def test_low_resolution_is_the_mean_of_each_block():
    c = conditions.make("low_resolution", (16, 8, 3), factor=4)
    small = np.asarray(c.observe(jnp.asarray(PHOTOS)))
    assert small.shape[1:] == c.observed == (4, 2, 3)
    np.testing.assert_allclose(small[1, 2, 1], PHOTOS[1, 8:12, 4:8].mean((0, 1)), atol=1e-6)
    shown = c.apply(jnp.asarray(PHOTOS))
    assert shown.shape == PHOTOS.shape and c.channels == 3
    assert jnp.all(jnp.abs(shown) <= 1)


def test_enlarging_keeps_what_is_constant_and_linear():
    c = conditions.make("low_resolution", (32, 32, 1), factor=2)
    np.testing.assert_allclose(c.apply(jnp.full((1, 32, 32, 1), 0.3)), 0.3, atol=1e-6)
    ramp = jnp.broadcast_to(jnp.linspace(-0.9, 0.9, 32)[None, :, None, None], (1, 32, 32, 1))
    inside = np.s_[:, 6:-6]  # the border has no neighbour to go on with
    np.testing.assert_allclose(c.apply(ramp)[inside], ramp[inside], atol=1e-5)


def test_gray_is_pillow_s_luma():
    photos = np.random.default_rng(1).integers(0, 256, (2, 16, 8, 3), np.uint8)
    c = conditions.make("gray", (16, 8, 3))
    ours = np.asarray(c.apply(data.to_float(jnp.asarray(photos))))
    assert ours.shape == (2, 16, 8, 1) and c.channels == 1
    theirs = np.stack([np.asarray(Image.fromarray(p).convert("L")) for p in photos])[..., None]
    np.testing.assert_allclose(127.5 * (ours + 1), theirs, atol=0.51)  # Pillow rounds to whole levels


@pytest.mark.parametrize(
    "name, shape, options, words",
    [
        ("low_resolution", (8, 8, 1), {"factor": 3}, ["condition.factor=3", "8x8"]),
        ("low_resolution", (8, 8, 1), {"factor": 1}, ["condition.factor=1"]),
        ("low_resolution", (8, 8, 1), {"factr": 2}, ["'factr'", "did you mean 'factor'?"]),
        ("low_resolution", (2,), {}, ["needs images"]),
        ("gray", (8, 8, 1), {}, ["colour", "data.channels=3"]),
        ("grey", (8, 8, 3), {}, ["did you mean 'gray'?"]),
        ("none", (8, 8, 3), {"factor": 2}, ["'factor'"]),
    ],
)
def test_mistakes(name, shape, options, words):
    with pytest.raises(UserError) as e:
        conditions.make(name, shape, **options)
    assert all(w in str(e.value) for w in words), e.value


def test_the_network_gets_the_channels(tiny):
    config = tiny("digits", "condition=low_resolution", "condition.factor=2")
    with_image, without = experiment.build(config, (8, 8, 1), 10), experiment.build(tiny("digits"), (8, 8, 1), 10)
    stem = [jax.eval_shape(p.network.init, jax.random.key(0))["stem"]["kernel"].shape for p in (with_image, without)]
    assert [s[2] for s in stem] == [2, 1]


def test_label_dropout_leaves_the_image():
    """A network whose answer is right where the image is there and the label is not."""

    def apply(params, x, c_noise, cond, key=None):
        wrong = (cond["label"] != 10).astype(jnp.float32)[:, None, None, None]
        return params["a"] * cond["image"] + 100 * wrong

    gaussian = process.make(schedules.make("cosine"), "x0")
    condition = conditions.make("low_resolution", (8, 8, 1), factor=2)
    flat = jnp.broadcast_to(jnp.linspace(-1, 1, 6)[:, None, None, None], (6, 8, 8, 1))  # their own low resolution
    batch = {"image": flat, "label": jnp.arange(6)}
    network = Network(lambda key: {"a": jnp.ones(())}, apply, 10)
    times = timesteps.make("uniform")
    init = state.make_init(network, optax.identity(), times, gaussian)
    for dropout, low, high in ((1.0, 0.0, 1e-9), (0.0, 9e3, 1.1e4)):
        step = make_train_step(network, gaussian, times, optax.identity(), seed=0, condition=condition,
                               label_dropout=dropout)  # fmt: skip
        _, metrics = jax.jit(step)(init(jax.random.key(0)), batch)
        assert low <= metrics["loss"] <= high


def test_training_with_a_condition(conditioned_run):
    losses = [json.loads(l).get("loss") for l in (conditioned_run.workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [l for l in losses if l is not None]
    assert losses[-1] < 0.7 * losses[0]
    assert conditioned_run.outcome.val_loss < losses[0]
    # The picture: condition, sample, original, side by side.
    (path,) = (conditioned_run.workdir / "samples").glob("*.png")
    picture = np.asarray(Image.open(path))
    tile = 48 + 2
    assert (picture.shape[1] - 2) % (3 * tile) == 0
    condition, original = picture[2:50, 2:50], picture[2:50, 2 + 2 * tile : 50 + 2 * tile]
    assert abs(condition.mean() - original.mean()) < 3 and condition.std() < original.std()


@pytest.fixture(scope="module")
def model(conditioned_run):
    return models.load(conditioned_run.workdir)


@pytest.fixture(scope="module")
def digits(model):
    return np.asarray(data.to_float(data.load(model.config.data, "eval").batch(np.arange(6))["image"]))


def test_sampling_from_clean_images_or_small_ones(model, digits):
    key, labels = jax.random.key(1), [1, 2]
    clean = model.sample(key, num=6, images=digits, labels=labels, guidance=2.0)
    small = digits.reshape(6, 4, 2, 4, 2, 1).mean((2, 4))
    np.testing.assert_allclose(model.sample(key, num=6, images=small, labels=labels, guidance=2.0), clean, atol=1e-4)
    parts = model.sample(key, num=6, images=digits, labels=labels, guidance=2.0, batch_size=4)
    np.testing.assert_allclose(parts, clean, atol=1e-5)
    other = model.sample(key, num=6, images=digits[::-1], labels=labels, guidance=2.0)
    assert np.abs(other - clean).max() > 0.1  # it looks at them


def test_wrong_images(model, digits, run):
    with pytest.raises(UserError, match="upscale"):
        model.sample(jax.random.key(0), num=2)
    with pytest.raises(UserError, match=r"\(6, 4, 8, 1\).*8, 8, 1.*4, 4, 1"):
        model.sample(jax.random.key(0), num=2, images=digits[:, ::2])
    with pytest.raises(UserError, match="leave them out"):
        models.load(run.workdir).sample(jax.random.key(0), num=2, images=digits)


def test_a_run_from_before_conditions(run, tiny, tmp_path):
    """It loads and may be resumed with a config of today, but not with a condition."""
    workdir = shutil.copytree(run.workdir, tmp_path / "old")
    fields = json.loads((workdir / "config.json").read_text())
    assert fields.pop("condition") == {"name": "none"}
    (workdir / "config.json").write_text(json.dumps(fields))
    assert models.load(workdir).condition is None
    setup.settle_config(tiny("digits"), workdir)
    with pytest.raises(UserError, match=r"condition.name: none -> low_resolution"):
        setup.settle_config(tiny("digits", "condition=low_resolution"), workdir)


def test_options_on_the_command_line():
    config = configs.override(configs.default(), ["--config.condition=low_resolution", "--config.condition.factor=8"])
    assert config.condition.to_dict() == {"name": "low_resolution", "factor": 8}
    with pytest.raises(UserError, match="conditoin"):
        configs.override(configs.default(), ["--config.conditoin=gray"])
