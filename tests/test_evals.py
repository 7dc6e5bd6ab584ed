"""Measures of samples, against independent implementations and on real digits."""

import json
import shutil

import numpy as np
import pytest

from jax_diffusion.cli.main import main
from jax_diffusion.evals import classifier, frechet, pairs
from jax_diffusion.evals.judge import judge
from jax_diffusion.train import loop


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


def test_moments_of_batches_are_those_of_all():
    a = vectors(1000, 7, 0) + 1e4  # a mean far from nought: nothing may cancel
    whole = a.mean(0), np.cov(a, rowvar=False)
    for cuts in ([1000], [1, 999], [300, 300, 400]):
        got = frechet.moments_of_batches(np.split(a, np.cumsum(cuts)[:-1]))
        for x, y in zip(got, whole, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9)
    assert all(m.dtype == np.float64 for m in got)


def test_psnr_is_the_textbook_s():
    a = np.full((3, 4, 4, 1), 100, np.uint8)
    b = a.copy()
    b[0] += 5
    b[1, 0, 0] += 16
    expected = [20 * np.log10(255 / 5), 10 * np.log10(255**2 / 16), np.inf]
    np.testing.assert_allclose(pairs.psnr(a, b), expected, rtol=1e-12)
    np.testing.assert_allclose(pairs.psnr(b, a), expected, rtol=1e-12)  # and bytes do not wrap round


def test_pairs_compare_samples_and_the_condition_with_the_originals():
    rng = np.random.default_rng(0)
    originals = rng.integers(0, 256, (5, 8, 8, 1)).astype(np.uint8)
    half = lambda x: x[:, ::2, ::2]  # noqa: E731
    samples = originals.copy()
    samples[:, 1::2] = 0  # what was known is kept, the rest is wrong
    got = pairs.compare(samples, originals, originals[:, ::-1], half)
    assert got["consistency"] == 100.0 and got["psnr"] < 20
    assert got["condition"] == pytest.approx(pairs.psnr(originals[:, ::-1], originals).mean())
    gray = pairs.compare(samples.repeat(3, 3), originals.repeat(3, 3), originals, half)
    assert gray["condition"] is None


def test_a_model_conditioned_on_an_image_is_evaluated(conditioned_run, tmp_path, capsys):
    workdir = shutil.copytree(conditioned_run.workdir, tmp_path / "run")
    for _ in range(2):
        assert main(["evaluate", f"--workdir={workdir}", "--num=24", "--batch_size=24", "--metrics=frechet,psnr"]) == 0
    out = capsys.readouterr().out
    assert "frechet (pixel space, 24 against 24)" in out and "held-out pictures" in out
    lines = [json.loads(line) for line in (workdir / "evaluations.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and lines[-1] == json.loads((workdir / "evaluation.json").read_text())
    one, again = ({k: v for k, v in line.items() if k != "time"} for line in lines)
    assert one == again and lines[0]["time"] <= lines[1]["time"]
    assert one["step"] == 60 and one["ema"] is True and one["num"] == 24 and one["solver"] and "guidance" in one
    # The 8x8 digits at half the size: the average of four pixels is kept far better than the four.
    assert 5 < one["psnr"]["psnr"] < one["psnr"]["consistency"] and 5 < one["psnr"]["condition"] < 40


def test_psnr_of_a_model_without_a_condition_is_one_error(run, capsys):
    assert main(["evaluate", f"--workdir={run.workdir}", "--metrics=psnr"]) == 2
    assert "--metrics=psnr needs a model conditioned on an image" in capsys.readouterr().err


def test_by_default_what_the_model_allows_is_measured(tiny, tmp_path, capsys):
    loop.train(tiny("toy2d", "data.labels=False", "train.steps=10"), tmp_path, log=lambda line: None)
    assert main(["evaluate", f"--workdir={tmp_path}", "--num=40", "--batch_size=40"]) == 0
    assert {"frechet", "accuracy", "psnr"} & set(json.loads((tmp_path / "evaluation.json").read_text())) == {"frechet"}


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
