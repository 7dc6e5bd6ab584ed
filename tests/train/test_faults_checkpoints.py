"""Damaged checkpoints: found, named, set aside, and the one before used. All of it: damage_script.py."""

import dataclasses
import json
import random
import shutil
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from damage_script import HARMLESS, abstract, damages, files_of, resume, same, survives

from jax_diffusion.errors import UserError
from jax_diffusion.train import stored
from jax_diffusion.train.checkpoint import Checkpointer
from jax_diffusion.train.state import TrainState


def state(step):
    w = {"a": jax.random.normal(jax.random.key(step), (64, 3)), "b": jnp.full((5,), float(step))}
    return TrainState(jnp.int32(step), w, {"mu": w}, jax.tree.map(lambda x: 2 * x, w), {})


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("original")
    with Checkpointer(workdir) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(state(step), val_loss=0.5)
    return workdir


@pytest.fixture
def workdir(original, tmp_path):
    shutil.copytree(original, tmp_path / "run")
    return tmp_path / "run"


def test_any_damage_to_any_file_is_found(original, tmp_path):
    """Every file: each kind of damage for some, in turn."""
    shutil.copytree(original, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "3"
    states = {step: state(step) for step in (2, 3)}
    names, rng = files_of(folder), random.Random(0)
    assert len(names) > 20
    for i, name in enumerate(names):
        choices = list(damages((folder / name).read_bytes(), 1, rng))
        for what, data in [choices[i % len(choices)]] if name not in ("MANIFEST", *HARMLESS) else choices:
            outcome = survives(tmp_path / "run", name, what, data, states)
            assert outcome == "found" or (name in HARMLESS and what != "deleted"), f"{name} {what}"


def test_training_goes_on_from_the_one_before(workdir):
    """And saves the same step again, which orbax by itself would decline without a word."""
    (workdir / "checkpoints" / "3" / "params" / "manifest.ocdbt").write_bytes(b"")
    log = []
    with Checkpointer(workdir, log=log.append) as checkpoints:
        back = checkpoints.newest(lambda step: checkpoints.restore(abstract(state(0)), step))
        assert int(back.step) == 2 and same(back, state(2))
        checkpoints.save(state(3))
    (said,) = log
    assert said.startswith("checkpoint 3 is damaged: ") and "manifest.ocdbt has 0 bytes instead of" in said
    step, back, log = resume(workdir, abstract(state(0)))
    assert step == 3 and same(back, state(3)) and not log
    assert (workdir / said.rsplit("moved to ", 1)[1] / "params").is_dir()


def test_where_none_is_whole_nothing_is_moved(workdir):
    for step in (1, 2, 3):
        for path in (workdir / "checkpoints" / str(step)).glob("meta/metadata"):
            path.write_text("{")
    before = sorted(workdir.rglob("*"))
    for read in (resume, stored.restore_weights):
        with pytest.raises(UserError, match=r"is whole: 3: .*metadata is damaged.*; 2: .*Nothing was changed") as e:
            read(workdir, abstract(state(0)))
        assert "\n" not in str(e.value)
    assert sorted(workdir.rglob("*")) == before


def test_a_sampler_warns_and_takes_the_one_before(workdir, caplog):
    shutil.rmtree(workdir / "checkpoints" / "3" / "ema")
    weights, step = stored.restore_weights(workdir, abstract(state(0).params))
    assert step == 2 and same(weights, state(2).ema)
    (record,) = caplog.records
    assert "checkpoint 3 is damaged" in record.getMessage() and record.getMessage().endswith("is missing; using 2")
    assert stored.restore_weights(workdir, abstract(state(0).params), ema=False)[1] == 3  # the raw weights are whole
    assert stored.steps(workdir / "checkpoints") == [2, 3]  # a reader moves nothing


def test_leftovers_of_a_kill_are_removed_by_the_next_save(workdir):
    """A checkpoint without its name, and one half deleted."""
    folder = workdir / "checkpoints"
    shutil.copytree(folder / "3", folder / "4.orbax-checkpoint-tmp")
    shutil.rmtree(folder / "2" / "rest")
    with Checkpointer(workdir, log=lambda line: None) as checkpoints:
        back = checkpoints.newest(lambda step: checkpoints.restore(abstract(state(0)), step))
        assert int(back.step) == 3
        checkpoints.save(state(5))
    assert not list(folder.glob("*tmp*"))
    assert resume(workdir, abstract(state(0)))[0] == 5


def test_a_step_of_another_way_is_not_kept_for_it(workdir):
    """A run that went back to step 2 on its own saves its step 3, though there is one."""
    log, other = [], dataclasses.replace(state(3), params=state(7).params)
    with Checkpointer(workdir, log=log.append) as checkpoints:
        checkpoints.restore(abstract(state(0)), 2)
        checkpoints.save(other)
    assert [line.split(";")[0] for line in log] == ["checkpoint 3 is of a run that was left for step 3"]
    step, back, _ = resume(workdir, abstract(state(0)))
    assert step == 3 and same(back, other)


def test_a_checkpoint_of_an_older_version_is_restored(tmp_path):
    """Without a manifest, with a CRC of each leaf, without the counters of faults."""
    old = {step: dataclasses.replace(state(step), faults={}) for step in (2, 3)}
    with Checkpointer(tmp_path) as checkpoints:
        for of in old.values():
            checkpoints.save(of)
    step = tmp_path / "checkpoints" / "3"
    (step / "MANIFEST").unlink()
    rest = {"step": old[3].step, "opt_state": old[3].opt_state}
    crc = {
        item: {stored.path_name(p): zlib.crc32(np.asarray(x)) for p, x in jax.tree_util.tree_leaves_with_path(tree)}
        for item, tree in {"params": old[3].params, "ema": old[3].ema, "rest": rest}.items()
    }
    (step / "meta" / "metadata").write_text(json.dumps({"step": 3, "crc": crc}))
    assert same(resume(tmp_path, abstract(state(0)))[1], state(3))
    crc["ema"]["b"] ^= 1
    (step / "meta" / "metadata").write_text(json.dumps({"step": 3, "crc": crc}))
    found, _, log = resume(tmp_path, abstract(state(0)))
    assert found == 2 and "b does not have the values that were saved" in log
