"""--profile: a trace that TensorBoard and Perfetto open, with the steps asked for and no others."""

import gzip
import json

import pytest

from jax_diffusion.cli.main import main
from jax_diffusion.errors import UserError
from jax_diffusion.train import loop, profiling

FIELDS = ["train.steps=20", "train.eval_every=0", "train.checkpoint_every=100", "train.log_every=5"]


def traced_steps(workdir):
    """The numbers of the steps in the trace, and how many programs ran on the devices in it."""
    (path,) = (workdir / "profile").glob("plugins/profile/*/*.trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert list(path.parent.glob("*.xplane.pb"))  # TensorBoard's
    steps = [int(e["args"]["step_num"]) for e in events if e.get("name") == "train"]
    return steps, sum(e.get("name", "").startswith("ThunkExecutor::Execute") for e in events)


@pytest.mark.parametrize("k, window, steps", [(1, "3:7", [3, 4, 5, 6]), (1, "0:2", [0, 1]), (1, "18:20", [18, 19]),
                                              (4, "5:9", [8])])  # fmt: skip
def test_the_trace_holds_the_steps(tiny, tmp_path, k, window, steps):
    lines = []
    config = tiny("toy2d", *FIELDS, f"train.steps_per_dispatch={k}")
    outcome = loop.train(config, tmp_path, profile=window, log=lines.append)
    seen, programs = traced_steps(tmp_path)
    assert seen == steps and programs >= len(steps) and outcome.finished
    (line,) = (line for line in lines if line.startswith("profile of steps "))
    assert line.startswith(f"profile of steps {steps[0]} to {steps[-1] + k - 1} in {tmp_path}")
    assert "perfetto" in line and f"tensorboard --logdir={tmp_path / 'profile'}" in line


def test_a_run_that_stops_earlier_ends_its_trace(tmp_path):
    lines = []
    with profiling.Profile("2:8", 0, 10, tmp_path, lines.append) as profile:
        assert not profile.due(1) and profile.due(2)
        profile.turn(2)
        assert not profile.due(7)
    assert "the steps from 2 until it was interrupted" in lines[0] and list(tmp_path.rglob("*.xplane.pb"))


def test_a_window_that_no_dispatch_begins_in_is_said(tmp_path):
    lines = []
    with profiling.Profile("95:96", 0, 100, tmp_path, lines.append) as profile:
        profile.turn(90)
        profile.turn(100)
    assert lines == ["no profile was written: no dispatch began from step 95 on"]


@pytest.mark.parametrize("text, words", [("5", "START:STOP"), ("a:b", "START:STOP"), ("-1:3", "START:STOP"),
                                         ("7:7", "greater than START"), ("9:3", "for instance 9:14")])  # fmt: skip
def test_a_wrong_window_is_one_line(capsys, tmp_path, text, words):
    assert main(["train", "--config=toy2d", f"--workdir={tmp_path / 'x'}", f"--profile={text}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"--profile={text}" in error and words in error
    assert not (tmp_path / "x").exists()


def test_steps_that_the_run_does_not_take_are_an_error(tmp_path):
    for window in ("5:30", "2:8"):
        with pytest.raises(UserError, match=f"--profile={window}: this run goes from step 4 to 20"):
            profiling.Profile(window, 4, 20, tmp_path, print)
