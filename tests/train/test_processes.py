"""Two real processes on 127.0.0.1: they train as one does, end together, and go on together or alone."""

import contextlib
import io
import json
import os
import re
import signal

import jax
import numpy as np
import pytest
from processes import Processes

from jax_diffusion import model as models
from jax_diffusion.cli.main import main
from jax_diffusion.data import batch_indices

# A machine that is loaded, or stopped for a while, is no death.
PATIENT = {"JAX_DIFFUSION_HEARTBEAT_TIMEOUT": "600"}
DIGITS = ("train.steps=8", "optim.warmup=2", "train.eval_every=4", "train.sample_every=8", "train.log_every=1",
          "train.checkpoint_every=4", "sampling.num=6", "sampling.batch_size=6")  # fmt: skip
TOY = ("train.log_every=1", "train.checkpoint_every=10", "train.eval_every=0", "optim.schedule=constant")
SHARDS = ("mesh.data=1", "mesh.fsdp=2")  # data parallel: tests/launch/test_local.py
ENDLESS = "train.steps=1000000"


def scalars(workdir, key):
    records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {r["step"]: r[key] for r in records if key in r}


def alone(*arguments):
    """What a command says in this process, which joins no other."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        assert main(list(arguments)) == 0, said.getvalue()
    return said.getvalue()


@pytest.fixture(scope="module")
def runs(arguments, tmp_path_factory):
    """The digits, by two processes in shards and by one."""
    root = tmp_path_factory.mktemp("runs")

    def start(name, *mesh):
        return ("train", "--config=digits", f"--workdir={root / name}", *arguments("digits_dit", *DIGITS, *mesh))

    with Processes(2, *start("two", *SHARDS), **PATIENT) as two:
        assert two.end() == [0, 0], two[0].said + two[1].said
        (root / "said.0").write_text(two[0].said)
        (root / "said.1").write_text(two[1].said)
    alone(*start("one"))
    return root


def test_two_processes_train_as_one_does(runs):
    """Float32 sums in another order, over eight steps of Adam."""
    for key in ("loss", "val_loss"):
        two, one = scalars(runs / "two", key), scalars(runs / "one", key)
        assert two.keys() == one.keys() and len(one) >= 2
        np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-3, err_msg=key)
    a, b = models.load(runs / "two").params, models.load(runs / "one").params
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-3), a, b)


def test_every_process_says_its_rank_and_one_writes(runs):
    first, second = ((runs / f"said.{i}").read_text().splitlines() for i in (0, 1))
    assert any(re.match(r"process 0 of 2 on .*: 1 of 2 ", line) for line in first)
    ours = [line for line in second if not line.startswith(("[Gloo]", "W", "I", "E"))]
    assert ours and all(line.startswith("[1/2] ") for line in ours) and not any("[1/2]" in line for line in first)
    lines = (runs / "two" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == len(set(lines)) and len(list((runs / "two" / "tensorboard").iterdir())) == 1
    assert [p.name for p in (runs / "two" / "samples").iterdir()] == ["step_00000008.png"]


def test_two_processes_sample_what_one_does(runs, tmp_path):
    """And one file is written: the second process would write to a folder that is not there."""

    def command(name):
        return ("sample", f"--workdir={runs / 'two'}", "--num=5", "--guidance=2", "--steps=3", "--batch_size=4",
                f"--npz={tmp_path / name}.npz", f"--out={tmp_path / name}.png")  # fmt: skip

    with Processes(2, *command("two"), **PATIENT) as two:
        assert two.end() == [0, 0], two[0].said + two[1].said
    assert "5 samples at step 8" in two[0].said and "samples at" not in two[1].said
    alone(*command("one"))
    a, b = (np.load(tmp_path / f"{name}.npz")["arr_0"] for name in ("two", "one"))
    assert a.shape == (5, 8, 8, 1) and a.std() > 10
    assert np.abs(a.astype(int) - b).max() <= 1  # a rounding to 8 bits apart


def test_two_processes_evaluate_as_one_does(runs):
    command = ("evaluate", f"--workdir={runs / 'two'}", "--metrics=frechet,vlb", "--num=40", "--steps=3",
               "--likelihood_images=4", "--vlb_steps=5", "--batch_size=8")  # fmt: skip
    results = []
    with Processes(2, *command, **PATIENT) as two:
        assert two.end() == [0, 0], two[0].said + two[1].said
    results.append(json.loads((runs / "two" / "evaluation.json").read_text()))
    alone(*command)
    results.append(json.loads((runs / "two" / "evaluation.json").read_text()))
    two, one = results
    assert two["frechet"]["samples_to_real"] == pytest.approx(one["frechet"]["samples_to_real"], rel=1e-2)
    assert two["vlb"]["train"]["mean"] == pytest.approx(one["vlb"]["train"]["mean"], rel=1e-3)


def finishes(workdir, step, *, processes, mesh=()):
    """Resumes until `step`; returns what process 0 said."""
    fields = [f"--config.{f}" for f in (f"train.steps={step}", *mesh)]
    command = ("train", f"--workdir={workdir}", *fields)
    if processes == 1:
        return alone(*command)
    with Processes(processes, *command, **PATIENT) as them:
        assert them.end() == [0] * processes, them[0].said + them[1].said
        return them[0].said


@pytest.fixture(scope="module", params=[0, 1])
def bereaved(request, arguments, tmp_path_factory):
    """Two in shards, one of them killed; both started again, then one alone, then two: where each started."""
    victim = request.param
    workdir = tmp_path_factory.mktemp("killed") / "run"
    command = ("train", "--config=toy2d", f"--workdir={workdir}", *arguments("toy2d", *TOY, ENDLESS, *SHARDS))
    with Processes(2, *command, **PATIENT) as two:
        two[1 - victim].wait_for("step ", times=25)
        os.kill(two[victim].pid, signal.SIGKILL)
        status, said = two[1 - victim].ends(), two[1 - victim].said
    steps = sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    return victim, workdir, status, said, steps


def test_the_survivor_ends_and_says_so(bereaved):
    victim, _, status, said, steps = bereaved
    assert status == 75
    last = [line for line in said.splitlines() if "is gone" in line]
    assert len(last) == 1 and f"error: process {victim} of 2 is gone" in last[0], said
    assert (
        last[0].endswith(f"start all of them again: training resumes at step {steps[-1]}") and "Traceback" not in said
    )


@pytest.mark.parametrize("bereaved", [0], indirect=True)  # of the two, the harder to lose
def test_both_go_on_and_so_does_one_alone(bereaved):
    """A checkpoint of two processes restores in two and in one, and one of one process in two."""
    _, workdir, _, _, steps = bereaved
    at = steps[-1]
    for processes, mesh in ((2, ()), (1, ("mesh.fsdp=1",)), (2, SHARDS)):
        said = finishes(workdir, at + 3, processes=processes, mesh=mesh)
        assert f"at step {at} of {at + 3}" in said.replace(",", ""), said
        at += 3
    assert list(scalars(workdir, "loss")) == list(range(1, at + 1))


def test_sigterm_to_one_saves_in_both_at_the_same_step(arguments, tmp_path):
    command = ("train", "--config=toy2d", f"--workdir={tmp_path}/run", *arguments("toy2d", *TOY, ENDLESS))
    with Processes(2, *command, **PATIENT) as two:
        two[1].wait_for("step ", times=3)
        os.kill(two[1].pid, signal.SIGTERM)
        assert two.end() == [75, 75], two[0].said + two[1].said
        words = [re.search(r"saved at step ([\d,]+)", p.said) for p in two]
    assert words[0] and words[1] and words[0][1] == words[1][1]
    step = int(words[0][1].replace(",", ""))
    assert f"at step {step} of" in finishes(tmp_path / "run", step + 1, processes=2).replace(",", "")


def test_two_processes_leave_bad_data_behind_together(arguments, tmp_path):
    """NaN in the batches 10 to 15: both skip, go back to step 10 and on with later batches, as one process does."""
    batch, seed, n = 16, 0, 960
    points = np.random.default_rng(0).normal(size=(n, 2)).astype(np.float32)
    for step in range(10, 16):
        points[batch_indices(seed=seed, step=step, batch_size=batch, n=n)[step % batch]] = np.nan
    np.save(tmp_path / "points.npy", points)
    fields = arguments(
        "toy2d", "data.source=numpy", f"data.path={tmp_path}/points.npy", "data.holdout=0.0", "data.labels=False", *TOY,
        f"train.batch_size={batch}", "train.steps=20", "train.max_bad_steps=4", f"seed={seed}", "train.sample_every=0",
    )  # fmt: skip
    start = lambda name: ("train", "--config=toy2d", f"--workdir={tmp_path / name}", *fields)  # noqa: E731
    with Processes(2, *start("two"), **PATIENT) as two:
        assert two.end() == [0, 0], two[0].said + two[1].said
    assert "going back to step 10" in two[0].said
    alone(*start("one"))
    for key in ("rollbacks", "skipped"):
        ours = scalars(tmp_path / "two", key)
        assert list(ours)[-1] == 20 and ours == scalars(tmp_path / "one", key), key
    assert scalars(tmp_path / "two", "rollbacks")[20] == 1
    losses = [list(scalars(tmp_path / name, "loss").values()) for name in ("two", "one")]
    np.testing.assert_allclose(*losses, rtol=1e-3)
