"""Checkpoints: which are kept, what comes back, and that damage is noticed."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_diffusion import model as models
from jax_diffusion.errors import UserError
from jax_diffusion.train import manifest, sums
from jax_diffusion.train.checkpoint import Checkpointer, restore_weights
from jax_diffusion.train.state import TrainState


def state(step, size=4096):
    """Random leaves: compressed, they still fill their files."""
    w = jax.random.normal(jax.random.key(step), (size,))
    moments = {"mu": {"w": w + 1}, "nu": {"w": w + 2}}
    return TrainState(jnp.int32(step), {"w": w}, moments, {"w": 2 * w}, {"count": jnp.int32(7)})


def save(workdir, losses, keep=2):
    with Checkpointer(workdir, keep) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(state(step), loss)


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def kept(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("saved")
    save(workdir, {1: 0.5, 2: 0.1, 3: 0.4, 4: 0.3, 5: None})
    return workdir


def test_the_newest_and_the_best_are_kept(saved):
    assert kept(saved) == [2, 4, 5]


def test_without_validation_the_newest_are_kept(tmp_path):
    save(tmp_path, {1: None, 2: None, 3: None}, keep=1)
    assert kept(tmp_path) == [3]


@pytest.mark.parametrize("step", [None, 2])
def test_all_of_the_state_comes_back(saved, step):
    with Checkpointer(saved) as checkpoints:
        assert checkpoints.latest() == 5
        back = checkpoints.restore(abstract(state(0)), step)
    jax.tree.map(np.testing.assert_array_equal, back, state(step or 5))


def test_weights_and_average_are_told_apart(saved):
    shape = abstract(state(0).params)
    for ema, factor in ((True, 2), (False, 1)):
        weights, step = restore_weights(saved, shape, step=4, ema=ema)
        assert step == 4
        np.testing.assert_array_equal(weights["w"], factor * state(4).params["w"])
    assert restore_weights(saved, shape)[1] == 5


def test_an_unknown_step_is_answered_with_the_known_ones(saved):
    with pytest.raises(UserError, match=r"--checkpoint=3 is not in .*: there are 2, 4, 5$"):
        restore_weights(saved, abstract(state(0).params), step=3)


def test_no_checkpoint_is_said(tmp_path):
    with pytest.raises(UserError, match="has no checkpoint yet: train it with `jax-diffusion train"):
        restore_weights(tmp_path, abstract(state(0).params))


def test_another_network_is_said_in_one_line(saved):
    with Checkpointer(saved) as checkpoints, pytest.raises(UserError) as error:
        checkpoints.restore(abstract(state(0, size=2048)))
    assert "checkpoint 5 does not fit this config" in str(error.value) and "\n" not in str(error.value)
    assert "params/w is float32 [4096] in the checkpoint and float32 [2048] here" in str(error.value)


def test_a_sum_is_the_formula():
    def mixed(x):
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        return x ^ x >> 16

    x = np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float32)
    bits = [int(b) for b in x.view(np.uint32).ravel()]
    assert sums.of_tree({"x": x})["x"] == sum(mixed(b ^ mixed(i)) for i, b in enumerate(bits)) % 2**32


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8, jnp.bool_])
def test_a_sum_knows_every_element_and_its_place(dtype):
    x = jax.random.bernoulli(jax.random.key(0), shape=(7, 5)).astype(dtype)
    one = sums.of_tree({"x": x})
    assert one == sums.of_tree({"x": x})
    flips = [x.at[i, j].set(1 - x[i, j] if dtype != jnp.bool_ else ~x[i, j]) for i in range(7) for j in range(5)]
    found = {sums.of_tree({"x": y})["x"] for y in (x, *flips, x[::-1], x[:, ::-1])}
    assert len(found) == 1 + len(flips) + 2


def data_files(folder):
    """The files that hold arrays, largest first: a flip there meets numbers."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.stat().st_size > 8000]
    return sorted(files, key=lambda p: -p.stat().st_size)


@pytest.mark.parametrize("item", ["params", "ema", "rest"])
@pytest.mark.parametrize("place", [0.3, 0.6])
def test_a_flipped_byte_is_noticed(tmp_path, item, place):
    """By the manifest; and without one, as in a checkpoint of an old version, by the checksums of the leaves."""
    save(tmp_path, {9: 0.1})
    step = tmp_path / "checkpoints" / "9"
    file = data_files(step / item)[0]
    data = bytearray(file.read_bytes())
    data[int(place * len(data))] ^= 0xFF
    file.write_bytes(data)
    for named in (str(file), str(step / item)):
        with Checkpointer(tmp_path) as checkpoints, pytest.raises(UserError, match="checkpoint 9 is damaged") as e:
            checkpoints.restore(abstract(state(0)))
        assert "\n" not in str(e.value) and named in str(e.value)
        if item != "rest":
            with pytest.raises(UserError, match="checkpoint 9 is damaged"):
                restore_weights(tmp_path, abstract(state(0).params), step=9, ema=item == "ema")
        manifest.write(step)  # of what is there now


def test_a_run_keeps_its_average_beside_its_weights(run):
    model, raw = models.load(run.workdir), models.load(run.workdir, ema=False)
    assert model.step == raw.step == 60
    jax.tree.map(np.testing.assert_array_equal, model.params, run.outcome.state.ema)
    jax.tree.map(np.testing.assert_array_equal, raw.params, run.outcome.state.params)
    assert models.load(run.workdir, step=30).step == 30


def test_a_run_names_its_checkpoints(run):
    with pytest.raises(UserError, match=re.escape("--checkpoint=45") + ".*there are 30, 60"):
        models.load(run.workdir, step=45)
