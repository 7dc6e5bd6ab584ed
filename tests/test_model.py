"""Model.sample: image i of a seed is the same image however it is asked for."""

import jax
import numpy as np
import pytest

from jax_diffusion import experiment, guidance, solvers
from jax_diffusion import model as models
from jax_diffusion.errors import UserError
from jax_diffusion.solvers import endpoints, noise

KEY = jax.random.key(3)
# The batch size changes XLA's order of summation, nothing else; a few float32 steps amplify 1e-7 to this.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def model(run):
    return models.load(run.workdir)


@pytest.fixture(scope="module")
def table(model):
    """Stochastic, so that the noise of every step counts."""
    return solvers.make("ddim", model.process.schedule, 4, eta=1.0)


@pytest.fixture(scope="module")
def reference(model, table):
    return model.sample(KEY, table, 10, labels=[1, 2, 3], guidance=2.0, batch_size=7)


@pytest.mark.parametrize("batch_size", [1, 64])
def test_the_batch_size_does_not_matter(model, table, reference, batch_size):
    out = model.sample(KEY, table, 10, labels=[1, 2, 3], guidance=2.0, batch_size=batch_size)
    assert out.shape == (10, 8, 8, 1) and out.dtype == np.float32
    np.testing.assert_allclose(out, reference, atol=TOLERANCE)


def test_the_number_asked_for_does_not_matter(model, table, reference):
    out = model.sample(KEY, table, 4, labels=[1, 2, 3], guidance=2.0, batch_size=7)
    np.testing.assert_allclose(out, reference[:4], atol=TOLERANCE)


def test_samples_differ_from_each_other_and_between_seeds(model, table, reference):
    other = model.sample(jax.random.key(4), table, 10, labels=[1, 2, 3], guidance=2.0, batch_size=7)
    every = np.concatenate([reference, other]).reshape(20, -1)
    apart = np.abs(every[:, None] - every[None]).max(-1) + np.eye(20)
    assert apart.min() > 1e-2


def test_labels_are_taken_in_turn(model, table, reference):
    cycled = [1, 2, 3, 1, 2, 3, 1, 2, 3, 1]
    np.testing.assert_array_equal(model.sample(KEY, table, 10, labels=cycled, guidance=2.0, batch_size=7), reference)
    other = model.sample(KEY, table, 10, labels=5, guidance=2.0, batch_size=7)
    assert np.abs(other - reference).max() > 1e-2


def test_scale_solver_and_seed_are_data(model, table, reference):
    compiled = model.generate._cache_size()
    euler = solvers.make("ddim", model.process.schedule, 4, "leading", eta=0.3)
    a = model.sample(KEY, table, 10, labels=[1, 2, 3], guidance=3.0, batch_size=7)
    b = model.sample(KEY, euler, 10, labels=[4], guidance=0.5, batch_size=7)
    c = model.with_params(jax.tree.map(lambda p: p + 0.1, model.params), 7).sample(
        KEY, table, 10, labels=[4], guidance=2.0, batch_size=7
    )
    assert model.generate._cache_size() == compiled
    assert min(np.abs(x - reference).max() for x in (a, b, c)) > 1e-3


def test_guidance_of_one_is_no_guidance_and_zero_no_condition(model, table):
    def sample(**options):
        return model.sample(KEY, table, 7, batch_size=7, **options)

    one, plain = sample(labels=2, guidance=1.0), sample(labels=2)
    np.testing.assert_array_equal(one, plain)
    none, zero = sample(), sample(labels=2, guidance=0.0)
    np.testing.assert_allclose(zero, none, atol=TOLERANCE)
    assert np.abs(none - one).max() > 1e-3


def test_the_trajectory_ends_in_the_sample(model, table):
    out, film = model.sample(KEY, table, 5, labels=2, batch_size=2, trajectory=True)
    assert film.shape == (4, 5, 8, 8, 1)
    # The last row lands on its own prediction.
    np.testing.assert_allclose(film[-1], out, atol=TOLERANCE)
    assert np.abs(film[0] - out).max() > 1e-2


def test_clipped_as_the_recipe_says(model, reference):
    assert model.config.sampling.clip and np.abs(reference).max() <= 1.0


def test_progress_counts_to_the_end(model, table):
    seen = []
    model.sample(KEY, table, 10, labels=2, guidance=2.0, batch_size=7, progress=lambda *a: seen.append(a))
    assert seen == [(7, 10), (10, 10)]


@pytest.mark.parametrize("labels", [-1, 10, [0, 11]])
def test_a_label_outside_the_classes(model, labels):
    with pytest.raises(UserError, match="the classes are 0 to 9"):
        model.sample(KEY, None, 2, labels=labels)


def test_settings_of_guidance_are_data(model, table, reference):
    """Other numbers are the same program; a scale per sample is that sample's."""
    options = {"labels": [1, 2, 3], "batch_size": 7}

    def sample(settings, **more):
        return model.sample(KEY, table, 10, guidance=settings, **options, **more)

    full = guidance.Settings(2.0, (0.0, np.inf), 0.0, (1.0, np.inf))
    np.testing.assert_allclose(sample(full), reference, atol=TOLERANCE)
    compiled = model.generate._cache_size()
    other = sample(guidance.Settings(3.0, (0.2, 5.0), 0.7, (0.0, 2.0)))
    assert model.generate._cache_size() == compiled and np.abs(other - reference).max() > 1e-2
    mixed = sample([2.0, 5.0])
    np.testing.assert_array_equal(mixed[0::2], reference[0::2])
    np.testing.assert_array_equal(mixed[1::2], sample(5.0)[1::2])
    assert np.abs(sample(8.0, threshold=99.0) - sample(8.0)).max() > 1e-2


def test_negative_condition_takes_the_place_of_none(model, table):
    """cond against negative at scale 0 is the negative one's own sample; the same label is no guidance."""
    options = {"batch_size": 7}
    compiled = model.generate._cache_size()
    away = model.sample(KEY, table, 7, labels=2, negative=5, guidance=0.0, **options)
    same = model.sample(KEY, table, 7, labels=2, negative=2, guidance=4.0, **options)
    assert model.generate._cache_size() <= compiled + 1
    np.testing.assert_allclose(away, model.sample(KEY, table, 7, labels=5, **options), atol=TOLERANCE)
    np.testing.assert_allclose(same, model.sample(KEY, table, 7, labels=2, **options), atol=TOLERANCE)
    with pytest.raises(UserError, match="negative"):
        model.sample(KEY, table, 2, negative=1, guidance=2.0)


def test_autoguidance_by_another_checkpoint(run, model, table):
    weak = models.load(run.workdir, step=30)
    options = {"labels": 2, "batch_size": 7}
    zero = model.sample(KEY, table, 7, autoguide=weak, guidance=0.0, **options)
    np.testing.assert_allclose(zero, weak.sample(KEY, table, 7, **options), atol=TOLERANCE)
    compiled = model.generate._cache_size()
    two = model.sample(KEY, table, 7, autoguide=weak.params, guidance=2.0, **options)
    assert model.generate._cache_size() == compiled  # a model of the same kind is its parameters
    itself = model.sample(KEY, table, 7, autoguide=model, guidance=2.0, **options)
    plain = model.sample(KEY, table, 7, **options)
    np.testing.assert_allclose(itself, plain, atol=TOLERANCE)
    assert np.abs(two - plain).max() > 1e-2


def test_autoguidance_by_a_smaller_model(model, table, tiny):
    config = tiny("digits", "model.channels=8", "process.prediction=x0")
    parts = experiment.build(config, model.shape, len(model.class_names))
    small = models.make(config, parts.network.init(KEY), model.shape, model.class_names, 0, parts)
    zero = model.sample(KEY, table, 7, labels=2, autoguide=small, guidance=0.0, batch_size=7)
    np.testing.assert_allclose(zero, small.sample(KEY, table, 7, labels=2, batch_size=7), atol=TOLERANCE)
    config = tiny("digits", "process.schedule=linear")
    other = models.make(config, None, model.shape, model.class_names, 0, parts)
    with pytest.raises(UserError, match="schedule"):
        model.sample(KEY, table, 2, labels=2, autoguide=other, guidance=2.0)


def test_the_denoiser_that_solvers_are_learned_with_is_that_of_sampling(model):
    table = solvers.make("ddim", model.process.schedule, 4)
    keys = solvers.sample_keys(KEY, np.arange(6))
    x = np.asarray(noise.normal(keys, 0, model.shape))
    options = {"labels": [1, 2], "guidance": 2.0}
    ends = endpoints(table, x=x, **model.denoiser(6, **options))
    np.testing.assert_allclose(ends, model.sample(KEY, table, 6, **options), atol=TOLERANCE)
