"""--cache and --dtype of `sample` and `evaluate`, on a trained run."""

import json
import shutil

import numpy as np
import pytest

from jax_diffusion.cli.main import main


@pytest.fixture(scope="module")
def workdir(run, tmp_path_factory):
    """A copy: commands write into it."""
    return shutil.copytree(run.workdir, tmp_path_factory.mktemp("speed") / "run")


@pytest.fixture
def sample(workdir, tmp_path, capsys):
    """sample("--cache=2") -> (images as integers, what was printed)."""

    def call(*arguments):
        npz = tmp_path / "samples.npz"
        assert main(["sample", f"--workdir={workdir}", "--num=4", f"--out={npz}.png", f"--npz={npz}", *arguments]) == 0
        with np.load(npz) as arrays:
            return arrays["arr_0"].astype(int), capsys.readouterr().out

    return call


def test_samples_with_kept_features_and_in_bfloat16(sample):
    plain, out = sample()
    assert "FLOPs" not in out
    same, _ = sample("--cache=1")
    assert np.abs(same - plain).max() <= 1
    kept, out = sample("--cache=0,3", "--cache_depth=2")
    assert "inner layers in 2 of them" in out and np.abs(kept - plain).max() > 1
    half, _ = sample("--dtype=bfloat16")
    apart = np.abs(half - plain)
    assert apart.max() > 0 and apart.mean() < 4
    np.testing.assert_array_equal(sample("--dtype=float32")[0], plain)


def test_evaluate_says_what_was_kept(workdir):
    arguments = ["evaluate", f"--workdir={workdir}", "--metrics=frechet", "--num=20", "--batch_size=20", "--cache=3"]
    assert main([*arguments, "--cache_power=1.5", "--cache_center=0.5"]) == 0
    kept = json.loads((workdir / "evaluation.json").read_text())["cache"]
    assert (kept["every"], kept["depth"], kept["power"], kept["center"]) == (3, 1, 1.5, 0.5)


@pytest.mark.parametrize(
    "typed, said",
    [
        (["--cache=0"], ["cache=0", "at least 1"]),
        (["--cache=often"], ["--cache", "'often'"]),
        (["--cache=0,9"], ["evaluation 9", "0 to 3"]),
        (["--cache=2", "--cache_depth=7"], ["depth=7", "1 to 3"]),
        (["--cache_depth=2"], ["--cache_depth=2", "--cache=3"]),
        (["--cache=0,1", "--cache_power=2"], ["power=2", "leave one out"]),
        (["--cache=2", "--solver=rk45"], ["rk45", "table"]),
        (["--cache=2", "--guidance=2", "--guidance_interval=0.2,5"], ["guidance interval", "cache"]),
        (["--dtype=float16"], ["--dtype", "'float16'"]),
    ],
)
def test_mistakes(workdir, typed, said, capsys):
    assert main(["sample", f"--workdir={workdir}", *typed]) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert [word for word in said if word not in err] == []
