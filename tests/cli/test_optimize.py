"""`jax-diffusion optimize`, and what `sample` can be told of guidance, on a trained run."""

import shutil

import numpy as np
import pytest

from jax_diffusion import solvers
from jax_diffusion.cli.main import main


@pytest.fixture(scope="module")
def workdir(run, tmp_path_factory):
    """A copy: commands write into it."""
    return shutil.copytree(run.workdir, tmp_path_factory.mktemp("cli") / "run")


@pytest.fixture
def sample(workdir, tmp_path, capsys):
    """sample("--num=3", ...) -> (images as floats, what was printed)."""

    def call(*arguments):
        npz = tmp_path / "samples.npz"
        assert main(["sample", f"--workdir={workdir}", f"--out={npz}.png", f"--npz={npz}", *arguments]) == 0
        with np.load(npz) as arrays:
            return arrays["arr_0"].astype(float), capsys.readouterr().out

    return call


def test_a_learned_table_is_printed_saved_and_sampled_with(workdir, sample, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "three.npz", tmp_path / "three.png"
    arguments = ["optimize", f"--workdir={workdir}", "--solver=ddim", "--steps=3", "--reference_steps=12", "--num=8"]
    status = main([*arguments, "--iterations=40", f"--out={out}", f"--plot={picture}", "--memory=2"])
    assert status == 0
    lines = capsys.readouterr().out.splitlines()
    assert "12 evaluations, on 8 held-out noises" in lines[0] and str(out) in lines[-1] and str(picture) in lines[-1]
    before, after = (float(line.split()[0]) for line in lines[2:4])
    assert after < before and "learned from ddim" in lines[3]
    assert picture.stat().st_size > 1000
    learned = solvers.load(out)
    assert len(learned) == 3 and learned.memory == 2 and learned.A[-1] == 0
    own, _ = sample("--num=4", "--solver=ddim", "--steps=3")
    images, said = sample("--num=4", f"--table={out}")
    assert "learned from ddim" in said and np.abs(images - own).max() > 2


def test_guidance_options_reach_the_denoiser(sample, workdir):
    """Each changes the samples, but for values that make it nothing."""
    base = ["--num=4", "--guidance=3", "--steps=4"]
    plain, _ = sample(*base)
    nothing = ["--guidance_interval=0,inf", "--guidance_rescale=0", "--apg=1,inf", "--guidance=3,3,3,3"]
    assert np.abs(sample(*base, *nothing)[0] - plain).max() <= 1
    settings = ["--guidance_interval=0.1,2", "--guidance_rescale=1", "--apg=0,0.5"]
    for options in (settings, ["--negative=4"], ["--guidance=3,6"], [f"--autoguide={workdir}:30"]):
        assert np.abs(sample(*base, *options)[0] - plain).max() > 2, options


def test_autoguidance_needs_no_labels(sample, workdir):
    base = ["--num=4", "--labels=none", "--steps=4"]
    plain, _ = sample(*base)
    assert np.abs(sample(*base, "--guidance=3", f"--autoguide={workdir}:30")[0] - plain).max() > 2
