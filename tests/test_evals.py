"""Measures of samples, against independent implementations and on real digits."""

import numpy as np
import pytest

from jax_diffusion.evals import classifier, frechet
from jax_diffusion.evals.judge import judge


def vectors(n, d, seed):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + rng.standard_normal(d)


@pytest.mark.parametrize("n, d", [(500, 6), (20, 30)])  # the second has singular covariances
def test_frechet_distance_is_the_textbook_s(n, d):
    linalg = pytest.importorskip("scipy.linalg")
    a, b = vectors(n, d, 0), vectors(n + 3, d, 1)
    (m1, c1), (m2, c2) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a, b))
    root = linalg.sqrtm((c1 @ c2).astype(complex)).real
    expected = np.sum((m1 - m2) ** 2) + np.trace(c1 + c2 - 2 * root)
    assert frechet.distance(a, b) == pytest.approx(expected, rel=1e-4)


def test_frechet_distance_of_a_set_to_itself():
    a = vectors(200, 8, 0)
    assert abs(frechet.distance(a, a)) < 1e-9 * np.trace(np.cov(a, rowvar=False))


def test_frechet_distance_of_a_shift_is_its_square():
    a = vectors(300, 5, 0)
    shift = np.array([1.0, -2, 0, 0.5, 3])
    assert frechet.distance(a, a + shift) == pytest.approx(np.sum(shift**2), rel=1e-9)


def test_frechet_distance_of_images_flattens_them():
    images = np.random.default_rng(0).standard_normal((2, 100, 3, 2, 1)).astype(np.float32)
    assert frechet.distance(*images) == pytest.approx(frechet.distance(*images.reshape(2, 100, 6)))


def test_frechet_distance_of_one_dimension():
    a = np.random.default_rng(0).standard_normal((1000, 1))
    # (s1 - s2)^2 for equal means
    assert frechet.distance(a - a.mean(), 3 * (a - a.mean())) == pytest.approx(4 * a.var(ddof=1), rel=1e-6)


@pytest.fixture(scope="module")
def digits():
    datasets = pytest.importorskip("sklearn.datasets")
    data = datasets.load_digits()
    images, labels = data.images[..., None] / 8 - 1, data.target
    return (images[:1200], labels[:1200]), (images[1200:1500], labels[1200:1500]), (images[1500:], labels[1500:])


def test_the_judge_knows_real_digits(digits):
    train, held_out, samples = digits
    verdict = judge(*train, *held_out, *samples)
    assert verdict.agreement > 0.9 and verdict.real_accuracy > 0.9 and verdict.train_images == 1200
    hits = [verdict.per_class[c] * np.sum(samples[1] == c) for c in range(10)]
    assert sum(hits) == pytest.approx(verdict.agreement * len(samples[1]))


def test_the_judge_is_not_fooled_by_digits_of_another_class(digits):
    train, held_out, (images, labels) = digits
    shuffled = np.random.default_rng(0).permutation(labels)
    assert 0.02 < judge(*train, *held_out, images, shuffled).agreement < 0.25
    assert judge(*train, *held_out, images, (labels + 1) % 10).agreement < 0.05


def test_a_classifier_s_features_tell_real_from_noise():
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = digits.images[..., None].astype(np.float32) / 8 - 1, digits.target
    c = classifier.train(images[:1200], labels[:1200])
    assert c.accuracy(images[1200:], labels[1200:]) > 0.85 and c.train_images == 1200
    assert c.features(images[:7]).shape == (7, 32)
    real = frechet.moments(c.features(images[:1200]))
    rng = np.random.default_rng(0)
    noisy = images[1200:] + rng.normal(0, 0.5, images[1200:].shape)

    def distance(x):
        return frechet.from_moments(*frechet.moments(c.features(x)), *real)

    assert distance(noisy) > 2 * distance(images[1200:])
