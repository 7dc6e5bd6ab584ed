"""train.rng: which generator draws times, noise and dropout. The run stays a function of its config and its step."""

import re

import jax
import numpy as np
import pytest

from jax_diffusion import config as configs
from jax_diffusion.errors import UserError
from jax_diffusion.train import loop

FIELDS = ["train.steps=12", "train.eval_every=6", "train.checkpoint_every=5", "optim.warmup=2"]


def first(state):
    return np.asarray(jax.tree.leaves(state.params)[0])


@pytest.fixture(scope="module")
def default(tiny, tmp_path_factory):
    return loop.train(tiny("toy2d", *FIELDS), tmp_path_factory.mktemp("default"), log=lambda line: None)


@pytest.mark.parametrize("rng", ["rbg", "unsafe_rbg"])
def test_another_generator_trains_and_resumes_bit_for_bit(tiny, tmp_path, rng, default):
    config, quiet = tiny("toy2d", *FIELDS, f"train.rng={rng}"), lambda line: None
    whole = loop.train(config, tmp_path / "whole", log=quiet)
    loop.train(config, tmp_path / "parts", stop_at=5, log=quiet)
    resumed = loop.train(None, tmp_path / "parts", log=quiet)
    jax.tree.map(np.testing.assert_array_equal, resumed.state, whole.state)
    assert np.isfinite(whole.val_loss) and not np.array_equal(first(whole.state), first(default.state))
    with pytest.raises(UserError, match=f"train.rng: {rng} -> threefry2x32"):
        loop.train(tiny("toy2d", *FIELDS), tmp_path / "parts", log=quiet)


def test_dropout_and_flips_draw_from_any_generator(tiny, tmp_path):
    """Images of a U-Net, traced and not run: every draw of the step takes the key's generator."""
    from jax_diffusion import sharding
    from jax_diffusion.train import program

    fields = ["model.multipliers=(1,)", "model.attention_levels=()", "model.blocks=1", "model.dropout=0.1",
              "data.flip=True"]  # fmt: skip
    texts = {}
    for rng in ("threefry2x32", "rbg", "unsafe_rbg"):
        built = program.build(tiny("digits", *fields, f"train.rng={rng}"), (8, 8, 1), 10, sharding.make_mesh())
        texts[rng] = str(built.trace().jaxpr)
    # How keys are written: key<fry>, key<rbg>, key<urbg>.
    kinds = {rng: set(re.findall(r"key<(\w+)>", text)) for rng, text in texts.items()}
    assert kinds == {"threefry2x32": {"fry"}, "rbg": {"rbg"}, "unsafe_rbg": {"urbg"}}


def test_runs_of_before_keep_their_generator(tiny):
    config = tiny("toy2d")
    del config.train.rng
    assert configs.from_json(configs.to_json(config)).train.rng == "threefry2x32"
    assert configs.differences(config, tiny("toy2d")) == []


def test_an_unknown_generator_is_an_error(tiny, tmp_path):
    with pytest.raises(UserError, match=r"--config.train.rng='threefry' is unknown: did you mean 'threefry2x32'\?"):
        loop.train(tiny("toy2d", "train.rng=threefry"), tmp_path, log=print)
