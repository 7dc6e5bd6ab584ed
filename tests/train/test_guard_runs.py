"""Whole runs through bad data: steps are skipped, the run goes back and on with other data, or ends with a diagnosis.
However it is killed on the way, it ends with the same bits."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from jax_diffusion import experiment, sharding
from jax_diffusion.errors import UserError
from jax_diffusion.train import checkpoint, loop, setup, state

BATCH, NOWHERE = 16, pathlib.Path("nowhere")
FIELDS = ["data.source=numpy", "data.holdout=0.0", "data.labels=False", "train.eval_every=0", "train.steps=40",
          f"train.batch_size={BATCH}", "train.checkpoint_every=10", "train.log_every=4", "train.max_bad_steps=4",
          "optim.schedule=constant"]  # fmt: skip


@pytest.fixture(scope="module")
def config_of(tiny, tmp_path_factory):
    """config_of(bad, *fields): of a set of points whose batches at the positions `bad` each hold one NaN."""

    def make(bad, *fields, inputs=60):
        points = np.random.default_rng(0).normal(size=(inputs * BATCH, 2)).astype(np.float32)
        path = tmp_path_factory.mktemp("points") / "points.npy"
        np.save(path, points)
        config = tiny("toy2d", *FIELDS, f"data.path={path}", *fields)
        order = setup.prepare(config, path.parent).source.order
        for position in bad:
            points[order.indices(config.seed, position * BATCH, (position + 1) * BATCH)[position % BATCH], 1] = np.nan
        np.save(path, points)
        return config

    return make


class Killed(BaseException):
    pass


def train(config, workdir, lines, kill_at=None, **options):
    """A run that dies when it logs a line that contains kill_at[0] for the kill_at[1]-th time."""
    count = 0

    def log(line):
        nonlocal count
        lines.append(line)
        if kill_at and kill_at[0] in line:
            count += 1
            if count == kill_at[1]:
                raise Killed

    try:
        return loop.train(config, workdir, log=log, **options)
    except Killed:
        return None


def identical(a, b):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def by_hand(config, bad):
    """The run with single steps of its own program, where the bad ones only count."""
    s = setup.prepare(config, NOWHERE)
    now, _ = s.program.create(jax.random.fold_in(jax.random.key(config.seed), 0))
    run = s.program.trace(experiment.abstract_batch(s.source, BATCH)).lower().compile()
    for step in range(config.train.steps):
        if step in bad:
            now = dataclasses.replace(now, step=jax.device_put(np.int32(step + 1), now.step.sharding))
        else:
            rows = s.source.order.indices(config.seed, step * BATCH, (step + 1) * BATCH)
            now, _ = run(now, jax.device_put(s.source.batch(rows), sharding.batch_sharding(s.mesh)))
    return now


def learned(s: state.TrainState):
    return s.step, s.params, s.opt_state, s.ema, s.timesteps, s.averages


@pytest.fixture(scope="module")
def skipping(config_of, tmp_path_factory):
    workdir, lines, bad = tmp_path_factory.mktemp("skipping"), [], {6, 7, 19}
    config = config_of(bad)
    return config, bad, workdir, lines, train(config, workdir, lines)


def test_a_few_bad_batches_are_skipped_and_said(skipping):
    config, bad, workdir, lines, outcome = skipping
    assert outcome.finished and int(outcome.state.faults["skipped"]) == 3
    identical(learned(outcome.state), learned(by_hand(config, bad)))
    by_step = {r["step"]: r for r in records(workdir) if "skipped" in r}
    assert [by_step[n]["skipped"] for n in (4, 8, 16, 20, 40)] == [0, 2, 2, 3, 3]
    assert all(np.isfinite(v) for r in by_step.values() for v in r.values())
    assert sum("2 of the last 4 steps were skipped" in line for line in lines) == 1
    rate = setup.prepare(config, NOWHERE).program.learning_rate
    for step, updates in {4: 4, 8: 6, 40: 37}.items():
        assert by_step[step]["learning_rate"] == pytest.approx(float(rate(updates - 1)))
    assert by_step[40]["rollbacks"] == 0 and not list(workdir.glob("diagnosis*"))


def test_nothing_is_saved_amid_a_row(config_of, tmp_path):
    """The run is stopped where steps are skipped: what is resumed is the checkpoint before."""
    config, lines = config_of({19, 20, 21}), []
    stopped = train(config, tmp_path, lines, stop_at=20)
    assert not stopped.finished and "stopped at step 20, saved at step 10; resume" in lines[-1]
    assert any("step 20: not saved, since the last 1 steps were skipped" in line for line in lines)
    resumed = train(None, tmp_path, lines)
    identical(learned(resumed.state), learned(by_hand(config, {19, 20, 21})))


@pytest.fixture(scope="module")
def rolling(config_of, tmp_path_factory):
    """Bad from position 20 to 25: at 20, where a checkpoint is, the run goes back twice."""
    workdir, lines, bad = tmp_path_factory.mktemp("rolling"), [], set(range(20, 26))
    config = config_of(bad)
    return config, workdir, lines, train(config, workdir, lines)


def test_a_row_of_bad_batches_is_left_behind(rolling):
    _, workdir, lines, outcome = rolling
    assert outcome.finished and outcome.step == 40
    assert {k: int(outcome.state.faults[k]) for k in ("shift", "rollbacks", "skipped")} == {
        "shift": 4, "rollbacks": 1, "skipped": 2}  # fmt: skip
    assert sum("going back to step 20" in line for line in lines) == 1
    found = json.loads((workdir / "diagnosis-21.json").read_text())
    assert found["first"] == {"what": "input", "path": "sample 4", "more": 0}
    assert found["position"]["batch"] == 20 and found["input"]["samples"][0]["sample"] == 4
    assert np.isfinite(found["input"]["mean"]) and not found["exact"] and len(found["position"]["examples"]) == BATCH
    # Every step once, as if the other way had never been.
    steps = [r["step"] for r in records(workdir) if "skipped" in r]
    assert steps == sorted(set(steps)) and steps[-1] == 40 and 24 in steps


def test_other_data_and_other_noise_are_drawn(rolling, config_of):
    """After it, step n is what step n + 4 would have been: the same batches, times and noise."""
    config, _, _, outcome = rolling
    assert int(outcome.state.step) == 40
    s = setup.prepare(config, NOWHERE)
    run = jax.jit(s.program.train_step())
    rows = s.source.order.indices(config.seed, 44 * BATCH, 45 * BATCH)
    batch = jax.device_put(s.source.batch(rows))
    ahead = dataclasses.replace(outcome.state, step=jax.numpy.int32(40))
    plain = dataclasses.replace(ahead, step=jax.numpy.int32(44), faults={**ahead.faults, "shift": jax.numpy.int32(0)})
    assert float(run(ahead, batch)[1]["loss"]) == float(run(plain, batch)[1]["loss"])


KILLS = {
    "amid going back": ("resuming", 1),
    "before it has saved again": ("step 24", 2),
    "after it has saved again": ("step 36", 1),
}


@pytest.mark.parametrize("moment", KILLS)
def test_a_kill_around_a_rollback_changes_nothing(rolling, tmp_path, moment):
    config, workdir, _, outcome = rolling
    lines = []
    assert train(config, tmp_path, lines, KILLS[moment]) is None
    resumed = train(None, tmp_path, lines)
    assert resumed.finished
    identical(resumed.state, outcome.state)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (workdir / "metrics.jsonl").read_bytes()


def test_several_steps_a_dispatch_go_back_too(config_of, tmp_path):
    config, lines = config_of(range(20, 26), "train.steps_per_dispatch=3"), []
    outcome = train(config, tmp_path, lines)
    assert outcome.finished and int(outcome.state.faults["rollbacks"]) == 1
    # Saved after 12 and 21 steps, and 21 lies amid the row.
    assert sum("going back to step 12" in line for line in lines) == 1
    assert int(outcome.state.faults["shift"]) == 24 - 12


def test_a_run_that_explodes_ends_with_a_diagnosis(config_of, tmp_path):
    config = config_of((), "optim.learning_rate=1e38", "optim.warmup=0", "train.max_rollbacks=1")
    lines = []
    with pytest.raises(UserError) as error:
        train(config, tmp_path, lines)
    message = str(error.value)
    assert "\n" not in message and "after 1 rollbacks: 4 steps in a row" in message and "diagnosis-" in message
    assert "learning_rate" in message and "max_rollbacks=3" in message
    assert sum("going back to step 0" in line for line in lines) == 1
    found = [json.loads(path.read_text()) for path in tmp_path.glob("diagnosis-*.json")]
    assert found and all(f["first"]["what"] in ("parameters", "prediction", "loss", "gradient") for f in found)
    assert all(f["input"]["not_finite"] == 0 for f in found)


def test_the_diagnosis_names_the_parameter(config_of, tmp_path):
    """One weight of a checkpoint is spoilt: it is named, and not all that follows from it."""
    outcome = train(config_of((), "train.max_rollbacks=0"), tmp_path, [], stop_at=10)
    spoilt = jax.tree.map(lambda x: x, outcome.state.params)
    spoilt["blocks"]["1"]["up"]["kernel"] = spoilt["blocks"]["1"]["up"]["kernel"].at[0, 0].set(np.nan)
    with checkpoint.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(dataclasses.replace(outcome.state, params=spoilt, step=outcome.state.step + 1))
    with pytest.raises(UserError, match="the first that is not finite is parameters: blocks/1/up/kernel ") as error:
        train(None, tmp_path, [])
    found = json.loads((tmp_path / "diagnosis-12.json").read_text())
    assert str(tmp_path / "diagnosis-12.json") in str(error.value)
    assert found["parameters"]["paths"] == ["blocks/1/up/kernel"] and found["exact"]
    assert found["prediction"]["not_finite"] == BATCH and found["input"]["not_finite"] == 0
    assert found["gradient"]["not_finite"] > 1 and found["moments"]["not_finite"] == 0
