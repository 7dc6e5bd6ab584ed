"""launch/local.sh: real processes that meet on 127.0.0.1."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from jax_diffusion import model as models
from jax_diffusion.train import loop

SCRIPT = pathlib.Path(__file__).parents[2] / "launch" / "local.sh"


def launch(*arguments, timeout=300, **env):
    program = pathlib.Path(sys.executable).with_name("jax-diffusion")
    return subprocess.run(
        [str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "JAX_DIFFUSION": str(program), **env},
    )


def test_dry_run_prints_one_command_a_process():
    done = launch("--dry-run", 2, "train", "--config=toy2d", "--workdir=runs/two", PORT="23456")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 2
    for i, line in enumerate(lines):
        assert f"JAX_PROCESS_ID={i} " in line and "JAX_NUM_PROCESSES=2" in line and "127.0.0.1:23456" in line
        assert line.endswith("train --config=toy2d --workdir=runs/two")


@pytest.mark.parametrize("arguments", [(), ("two", "train"), (0, "train"), (2,)])
def test_a_wrong_call_is_one_line(arguments):
    done = launch(*arguments)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "number of processes" in done.stderr


@pytest.mark.parametrize("name, value", [("RESTARTS", "often"), ("GRACE", "-1"), ("PORT", "http")])
def test_a_wrong_variable_is_one_line(name, value):
    done = launch(2, "train", **{name: value})
    assert done.returncode == 2 and done.stderr == f"launch/local.sh: error: {name}={value} is no whole number\n"


@pytest.fixture
def fake(tmp_path):
    """fake("kill -KILL $$", 2): a program whose process 1 does this the first two times, while process 0 waits. What
    was started when is in the file starts."""
    program, starts = tmp_path / "program", tmp_path / "starts"

    def make(act, times):
        program.write_text(
            "#!/usr/bin/env bash\n"
            f'echo "$JAX_PROCESS_ID $JAX_COORDINATOR_ADDRESS $*" >>"{starts}"\n'
            f'if (($(grep -c "^$JAX_PROCESS_ID" "{starts}") <= {times})); then\n'
            f"  if ((JAX_PROCESS_ID == 1)); then {act}; else exec sleep 600; fi\nfi\n"
        )
        program.chmod(0o755)
        return {"JAX_DIFFUSION": str(program), "GRACE": "1"}

    make.starts = lambda: sorted(line.split()[0] for line in starts.read_text().splitlines())
    return make


@pytest.mark.parametrize("act", ["exit 75", "kill -KILL $$", "kill -ABRT $$"])
def test_what_can_be_resumed_is_started_again(fake, act, tmp_path):
    done = launch(2, "train", f"--workdir={tmp_path}/run", RESTARTS="5", **fake(act, 2))
    assert done.returncode == 0 and fake.starts() == ["0"] * 3 + ["1"] * 3
    assert "start 2 of at most 6" in done.stderr and "start 3 of at most 6" in done.stderr


def test_it_is_not_started_for_ever(fake, tmp_path):
    done = launch(2, "train", f"--workdir={tmp_path}/run", RESTARTS="1", **fake("exit 75", 9))
    assert done.returncode == 75 and fake.starts() == ["0", "0", "1", "1"]
    assert done.stderr.endswith("launch/local.sh: ended with status 75; start it again to resume\n")


def test_a_mistake_ends_all_at_once_and_is_not_repeated(fake, tmp_path):
    done = launch(2, "train", f"--workdir={tmp_path}/run", RESTARTS="5", **fake("exit 2", 9))
    assert done.returncode == 2 and fake.starts() == ["0", "1"]
    assert done.stderr == f"launch/local.sh: a process failed with status 2; see {tmp_path}/run.process-*.log\n"


def test_without_restarts_the_status_says_why(fake, tmp_path):
    done = launch(3, "train", f"--workdir={tmp_path}/run", **fake("kill -KILL $$", 1))
    assert done.returncode == 137 and fake.starts() == ["0", "1", "2"]


def test_digits_in_two_processes_train_as_in_one(tmp_path, arguments, tiny):
    fields = ("optim.warmup=2", "train.steps=8", "train.eval_every=8", "train.log_every=2", "train.sample_every=0")
    workdir = tmp_path / "two"
    overrides = arguments("digits_dit", *fields)
    done = launch(2, "train", "--config=digits", f"--workdir={workdir}", *overrides)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 cpu device(s)" in done.stdout

    loop.train(tiny("digits_dit", *fields), tmp_path / "one", log=lambda line: None)
    read = lambda d: [json.loads(line) for line in (d / "metrics.jsonl").read_text().splitlines()]  # noqa: E731
    two, one = read(workdir), read(tmp_path / "one")
    # Float32 sums in another order, over 8 steps of Adam.
    for key in ("loss", "val_loss"):
        np.testing.assert_allclose(
            [r[key] for r in two if key in r], [r[key] for r in one if key in r], rtol=2e-3, err_msg=key
        )
    a, b = models.load(workdir).params, models.load(tmp_path / "one").params
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-3), a, b)
