"""`jax-diffusion evaluate --metrics=bpd,vlb`: of 8-bit images with labels, and of points."""

import json
import math
import shutil

import numpy as np
import pytest

from jax_diffusion import data, likelihood
from jax_diffusion import model as models
from jax_diffusion.cli.main import main
from jax_diffusion.evals import likelihood as evals
from jax_diffusion.train import loop


@pytest.fixture(scope="module")
def workdir(run, tmp_path_factory):
    """A copy: commands write into it."""
    return shutil.copytree(run.workdir, tmp_path_factory.mktemp("bpd") / "run")


@pytest.fixture(scope="module")
def points(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("points") / "run"
    loop.train(tiny("toy2d"), folder, log=lambda line: None)
    return folder


def test_evaluate_writes_both_splits_with_standard_errors(workdir, capsys):
    arguments = ["--metrics=bpd,vlb", "--likelihood_images=6", "--likelihood_draws=2", "--vlb_steps=10"]
    assert main(["evaluate", f"--workdir={workdir}", *arguments]) == 0
    out = capsys.readouterr().out
    assert out.count(" bits/dim of 6 training images, ") == 2 and out.count("+-") == 4
    assert "dequantised" in out and "true labels" in out
    written = json.loads((workdir / "evaluation.json").read_text())
    assert written["step"] == 60 and {"bpd", "vlb"} == {*written} & {"bpd", "vlb", "accuracy", "frechet"}
    for metric in ("bpd", "vlb"):
        for split in ("train", "eval"):
            got = written[metric][split]
            # Uniform over 256 values is 8 bits; 60 steps of training are worse than a good model and finite.
            assert 0 < got["mean"] < 20 and got["draws_stderr"] > 0 and 0 < got["stderr"] < 5
            assert got["images"] == 6 and got["failed"] == 0 and got["unit"] == "bits"
    assert written["vlb"]["eval"]["evaluations"] == 10


def test_the_labels_and_the_weights_matter(workdir):
    model = models.load(workdir)
    source = data.load(model.config.data, "eval")
    kept = evals.vlb(model, source, 12, 4)
    assert kept == evals.vlb(model, source, 12, 4, batch_size=5)._replace(mean=kept.mean, stderr=kept.stderr)
    assert kept.mean == pytest.approx(evals.vlb(model, source, 12, 4, batch_size=5).mean, rel=1e-4)
    raw = evals.vlb(models.load(workdir, ema=False), source, 12, 4)

    class Mislabelled:
        def __len__(self):
            return len(source)

        def batch(self, rows):
            batch = source.batch(rows)
            return {**batch, "label": (batch["label"] + 1) % 10}

    wrong = evals.vlb(model, Mislabelled(), 12, 4)
    assert abs(raw.mean - kept.mean) > 1e-4 and wrong.mean != kept.mean


def test_a_model_compiles_a_likelihood_once(workdir, monkeypatch):
    model, traced = models.load(workdir), []
    inner = evals.likelihood.log_likelihood
    monkeypatch.setattr(evals.likelihood, "log_likelihood", lambda *a, **k: traced.append(1) or inner(*a, **k))
    for split in ("train", "eval"):
        evals.bpd(model, data.load(model.config.data, split), 4)
    assert len(traced) == 1
    other = models.load(workdir)
    evals.bpd(other, data.load(model.config.data, "eval"), 4)
    assert len(traced) == 2  # another model, another program


def test_standard_errors_are_those_of_the_values():
    values = np.random.default_rng(0).normal(3, 1, (4, 500)) + np.random.default_rng(1).normal(0, 2, 500)
    got = evals._summary(values, np.full(values.shape, 7.0), "bits")
    assert got.stderr == pytest.approx(math.sqrt((4 + 1 / 4) / 500), rel=0.15)  # images, and draws averaged
    assert got.draws_stderr == pytest.approx(math.sqrt(1 / 4 / 500), rel=0.1)
    values[1, 3] = np.nan  # one draw that failed takes its image with it
    left = evals._summary(values, np.full(values.shape, 7.0), "bits")
    assert (left.failed, left.images, left.evaluations) == (1, 499, 7.0)
    assert left.mean == pytest.approx(np.delete(values, 3, axis=1).mean())


def test_points_are_measured_in_nats_of_their_density(points, capsys):
    assert main(["evaluate", f"--workdir={points}", "--metrics=bpd", "--likelihood_images=12"]) == 0
    out = capsys.readouterr().out
    assert "nats/dim of 12 training images" in out and "density itself" in out and "dequantised" not in out
    written = json.loads((points / "evaluation.json").read_text())["bpd"]
    assert written["eval"]["unit"] == "nats" and abs(written["eval"]["mean"]) < 5


def test_points_have_no_bound_in_bits(points, capsys):
    assert main(["evaluate", f"--workdir={points}", "--metrics=vlb"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "--metrics=vlb" in err and "--metrics=bpd" in err


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["--metrics=bpdd"], ["'bpdd'", "did you mean 'bpd'?"]),
        (["--metrics=bpd", "--likelihood_images=1"], ["--likelihood_images=1", "at least 2"]),
        (["--metrics=bpd", "--likelihood_draws=0"], ["--likelihood_draws=0", "at least"]),
        (["--metrics=vlb", "--vlb_steps=1"], ["--vlb_steps=1", "at least 2"]),
        (["--metrics=vlb", "--vlb_steps=5000"], ["steps=5000", "1000"]),
    ],
)
def test_mistakes(workdir, typed, words, capsys):
    assert main(["evaluate", f"--workdir={workdir}", *typed]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and all(w in err for w in words), err


def test_bits_and_nats_are_one_scale():
    """The nats of a density in [-1, 1] units and its bits differ by the bin's width alone."""
    nats = 1.3
    bits = likelihood.bits_per_dim(np.array([-nats * 6], np.float32), (6,))[0]
    assert bits == pytest.approx(nats / math.log(2) + math.log2(127.5), rel=1e-5)
