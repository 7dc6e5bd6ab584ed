"""The DiT recipe, shrunk, on four-channel latents: trained, sampled from, its pictures and arrays."""

import numpy as np
import pytest
from PIL import Image

from jax_diffusion import config as configs
from jax_diffusion import data, io
from jax_diffusion.cli.main import main

TINY = ["model.width=16", "model.depth=2", "model.heads=2", "train.batch_size=8", "train.steps=4", "train.log_every=2",
        "train.eval_every=0", "train.sample_every=4", "train.checkpoint_every=4",
        "sampling.steps=2", "sampling.num=4", "sampling.batch_size=4", "data.holdout=0.25"]  # fmt: skip


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    path = tmp_path_factory.mktemp("latents") / "latents.npz"
    rng = np.random.default_rng(0)
    images = 0.18215 * 5 * rng.standard_normal((32, 8, 8, 4)).astype(np.float32)
    np.savez(path, images=images, labels=np.arange(32) % 3)
    return path


def test_recipe_on_tiny_latents(latents, tmp_path, capsys):
    fields = [f"--config.{field}" for field in (*TINY, f"data.path={latents}")]
    assert main(["train", "--config=imagenet256_dit_xl2", f"--workdir={tmp_path}", *fields]) in (0, None)
    said = capsys.readouterr()
    assert "latents (pictures of them show three channels) of 8x8x4, 3 classes" in said.out + said.err
    assert Image.open(tmp_path / "samples" / "step_00000004.png").mode == "RGB"
    main(["sample", f"--workdir={tmp_path}", "--num=3", f"--npz={tmp_path}/drawn.npz", "--labels=0,2"])
    assert "samples.png (the first three of 4 channels)" in capsys.readouterr().out
    drawn = np.load(tmp_path / "drawn.npz")
    assert drawn["arr_0"].shape == (3, 8, 8, 4) and drawn["arr_0"].dtype == np.float32
    assert np.isfinite(drawn["arr_0"]).all() and np.abs(drawn["arr_0"]).max() > 1  # neither rounded nor clipped


def test_the_data_arrive_as_they_are_saved(latents):
    c = configs.override(configs.resolve("imagenet256_dit_xl2"), [f"--config.data.path={latents}"]).data
    source = data.load(c, "train")
    saved = np.load(latents)["images"]
    batch = source.batch(np.arange(4))["image"]
    assert batch.dtype == np.float32 and all((saved == one).all((1, 2, 3)).any() for one in batch)


def test_grids_of_two_and_four_channels_are_colour(tmp_path):
    four = np.random.default_rng(0).uniform(-1, 1, (2, 4, 4, 4)).astype(np.float32)
    np.testing.assert_array_equal(io.grid(four), io.grid(four[..., :3]))
    padded = np.concatenate([four[..., :2], np.full_like(four[..., :1], -1)], axis=-1)
    np.testing.assert_array_equal(io.grid(four[..., :2]), io.grid(padded))
    io.save_npz(tmp_path / "x.npz", four)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npz")["arr_0"], four)
