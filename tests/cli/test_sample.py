"""`jax-diffusion sample` and `evaluate` on a trained run."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from jax_diffusion import solvers
from jax_diffusion.cli.main import main


@pytest.fixture(scope="module")
def workdir(run, tmp_path_factory):
    """A copy: commands write into it."""
    return shutil.copytree(run.workdir, tmp_path_factory.mktemp("cli") / "run")


@pytest.fixture
def sample(workdir, tmp_path, capsys):
    """sample("--num=3", ...) -> (images uint8, labels or None, what was printed)."""
    calls = []

    def call(*arguments):
        calls.append(arguments)
        npz = tmp_path / f"{len(calls)}.npz"
        assert main(["sample", f"--workdir={workdir}", f"--out={npz}.png", f"--npz={npz}", *arguments]) == 0
        with np.load(npz) as arrays:
            return arrays["arr_0"], arrays.get("arr_1"), capsys.readouterr().out

    return call


def test_help_names_every_solver(capsys):
    with pytest.raises(SystemExit):
        main(["sample", "--help"])
    words = capsys.readouterr().out.replace(",", " ").split()
    assert {*solvers.SOLVERS, *solvers.METHODS} <= set(words)


def apart(a, b):
    return np.abs(a.astype(int) - b.astype(int)).max()


def test_the_recipe_s_own_samples(workdir, capsys):
    assert main(["sample", f"--workdir={workdir}"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("20 samples at step 60 with ") and out.count("\n") == 1
    assert out.rstrip().endswith(f"{workdir}/samples.png")
    # One column a class.
    assert Image.open(workdir / "samples.png").size == (10 * 50 + 2, 2 * 50 + 2)


def test_npz_holds_uint8_images_and_labels(sample, tmp_path):
    images, labels, _ = sample("--num=5", "--labels=3,7")
    assert images.shape == (5, 8, 8, 1) and images.dtype == np.uint8
    np.testing.assert_array_equal(labels, [3, 7, 3, 7, 3])
    picture = np.asarray(Image.open(tmp_path / "1.npz.png"))
    # Five in two columns: the classes'. The tile of image 1 begins two pixels after the one before it.
    np.testing.assert_array_equal(picture[2:50:6, 52:100:6, 0], images[1, ..., 0])


def test_labels_by_name_by_number_and_none(sample):
    every, labels, _ = sample("--num=12")
    np.testing.assert_array_equal(labels, [*range(10), 0, 1])
    one, labels, _ = sample("--num=12", "--labels=0")
    np.testing.assert_array_equal(labels, 0)
    assert apart(every[0], one[0]) <= 1 and apart(every[10], one[10]) <= 1 and apart(every, one) > 10
    none, labels, _ = sample("--num=12", "--labels=none")
    assert labels is None and apart(none, one) > 2


def test_class_names_are_labels():
    from jax_diffusion.cli.sample import parse_labels

    names = ("daisy", "rose", "7")
    assert parse_labels("rose,0,7,1", names) == [1, 0, 2, 1]  # a name goes before a number
    assert parse_labels(None, names) == [0, 1, 2] and parse_labels("none", names) is None
    assert parse_labels(None, ()) is None


def test_image_i_is_the_same_in_any_batch(sample):
    a, b, c = (sample("--num=6", "--solver=ddim", "--set", "eta=1", f"--batch_size={n}")[0] for n in (6, 1, 4))
    # A rounding error may carry a pixel over the edge between two bytes.
    assert apart(a, b) <= 1 and apart(a, c) <= 1
    assert apart(a[0], a[1]) > 10


def test_the_seed_decides(sample):
    a, b, c = (sample("--num=3", *seed)[0] for seed in ((), ("--seed=0",), ("--seed=1",)))
    np.testing.assert_array_equal(a, b)
    assert apart(a, c) > 10


def test_solver_options_reach_the_solver(sample):
    ddim = ["--num=3", "--solver=ddim", "--steps=5"]
    still, _, said = sample(*ddim, "--set", "eta=0")
    moved, _, also = sample(*ddim, "--set", "eta=1.0")
    assert "ddim(eta=0), 5 evaluations" in said and "ddim(eta=1), 5 evaluations" in also
    assert apart(still, moved) > 2
    leading, _, _ = sample(*ddim, "--grid=leading", "--set", "offset=1")
    assert apart(still, leading) > 2


def test_a_grid_of_times_has_its_own_number_of_steps(sample):
    assert "ddim(eta=0), 3 evaluations" in sample("--num=2", "--solver=ddim", "--grid=900,500,100")[2]
    assert "3 evaluations" in sample("--num=2", "--solver=ddim", "--grid=9,1,.1,0", "--set", "grid_unit=sigma")[2]


def test_heun_counts_its_evaluations(sample):
    assert "heun, 7 evaluations" in sample("--num=2", "--solver=heun", "--steps=4")[2]


def test_guidance_and_weights_and_checkpoint_matter(sample):
    plain, _, said = sample("--num=4", "--guidance=1")
    assert "at step 60" in said
    assert apart(plain, sample("--num=4", "--guidance=4")[0]) > 1
    assert apart(plain, sample("--num=4", "--guidance=1", "--no-ema")[0]) > 1
    old, _, said = sample("--num=4", "--guidance=1", "--checkpoint=30")
    assert "at step 30" in said and apart(plain, old) > 1


def test_a_film_has_a_frame_an_evaluation(sample, tmp_path):
    path = tmp_path / "films" / "film.gif"
    *_, out = sample("--num=4", "--steps=6", f"--trajectory={path}")
    assert Image.open(path).n_frames == 6 and str(path) in out


def test_evaluate_prints_and_writes(workdir, capsys):
    assert main(["evaluate", f"--workdir={workdir}", "--num=60", "--batch_size=60"]) == 0
    accuracy, frechet = capsys.readouterr().out.splitlines()
    results = json.loads((workdir / "evaluation.json").read_text())
    assert results["step"] == 60 and results["evaluations"] == 4
    assert results["accuracy"]["judge_accuracy"] > 0.9 and 0 <= results["accuracy"]["agreement"] <= 1
    assert accuracy.startswith(f"accuracy: {results['accuracy']['agreement']:.1%} of 60 samples")
    between = results["frechet"]["real_to_real"]
    assert results["frechet"]["images"] == 60 and 0 < between < results["frechet"]["samples_to_real"]
    assert frechet.startswith("frechet") and f"{between:.3f}" in frechet


def test_evaluate_one_metric(workdir, capsys):
    assert main(["evaluate", f"--workdir={workdir}", "--num=60", "--batch_size=60", "--metrics=frechet"]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    assert "accuracy" not in json.loads((workdir / "evaluation.json").read_text())
