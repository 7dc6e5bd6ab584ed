"""Every image recipe, narrowed, on the real data set it is for (ImageNet's on flowers): it learns; the one that has the
most to keep also stops and resumes."""

import json
import pathlib

import numpy as np
import pytest

from jax_diffusion import config as configs
from jax_diffusion.train import loop

DATA = pathlib.Path(__file__).parents[3] / "shared" / "data"
SMALL = ["model.channels=16", "model.multipliers=(1,2)", "model.blocks=1", "model.attention_levels=()",
         "model.heads=2", "model.head_channels=0", "model.dropout=0.0", "optim.learning_rate=2e-3", "optim.warmup=2",
         "optim.clip=1.0", "train.batch_size=16", "train.steps=40", "train.log_every=10", "train.eval_every=10",
         "train.eval_batches=4", "train.sample_every=0"]  # fmt: skip
RECIPES = {
    "mnist": ["data.path={}"],
    "cifar10_ddpm": ["data.path={}/cifar10-test.tar.gz", "data.size=(16,16)"],
    "cifar10_edm": ["data.path={}/cifar10-test.tar.gz", "data.size=(16,16)"],
    "flowers64": ["data.path={}/flowers64.tar.gz", "data.size=(16,16)"],
    "imagenet64_adm": ["data.path={}/flowers64.tar.gz", "data.size=(16,16)"],
    "imagenet64_edm2": ["data.path={}/flowers64.tar.gz", "data.size=(16,16)", "model.head_channels=8",
                        "model.uncertainty=16", "optim.hold=10", "ema.snapshot_every=20"],
}  # fmt: skip
STOPPED = "imagenet64_edm2"  # snapshots, uncertainty, a schedule that holds


@pytest.mark.skipif(not DATA.is_dir(), reason=f"the data folder {DATA} is absent")
@pytest.mark.parametrize("recipe", RECIPES)
def test_learns(recipe, tmp_path):
    config = configs.resolve(recipe)
    small = [f for f in SMALL if not f.startswith("model.") or f.split("=")[0].removeprefix("model.") in config.model]
    fields = [*small, *(field.format(DATA) for field in RECIPES[recipe])]
    config = configs.override(config, [f"--config.{f}" for f in fields])
    lines = []
    if recipe == STOPPED:
        stopped = loop.train(config, tmp_path, stop_at=25, log=lines.append)
        assert (stopped.step, stopped.finished) == (25, False)
        assert any("resume: jax-diffusion train" in line for line in lines)
        config = None
    done = loop.train(config, tmp_path, log=lines.append)
    assert (done.step, done.finished) == (40, True)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [r["loss"] for r in records if "loss" in r]
    assert len(losses) >= 4 and np.all(np.isfinite(losses))
    # On fixed held-out images, times and noise: what falls is the network's error, not luck.
    held_out = [r["val_loss"] for r in records if "val_loss" in r]
    assert len(held_out) == 4 and held_out[-1] < 0.97 * held_out[0]
