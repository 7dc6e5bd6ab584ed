"""launch/local.sh: real processes that meet on 127.0.0.1."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from jax_diffusion import model as models
from jax_diffusion.train import loop

SCRIPT = pathlib.Path(__file__).parents[1] / "launch" / "local.sh"


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


def test_two_processes_train_as_one_does(tmp_path, arguments, tiny):
    fields = ("train.steps=30", "train.eval_every=30", "train.log_every=10")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    workdir = tmp_path / "two"
    overrides = arguments("toy2d", *fields)
    done = launch(2, "train", "--config=toy2d", f"--workdir={workdir}", *overrides, PORT=port)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 cpu device(s)" in done.stdout

    loop.train(tiny("toy2d", *fields), tmp_path / "one", log=lambda line: None)
    read = lambda d: [json.loads(line) for line in (d / "metrics.jsonl").read_text().splitlines()]  # noqa: E731
    two, one = read(workdir), read(tmp_path / "one")
    # Float32 sums in another order, over 30 steps of Adam.
    for key in ("loss", "val_loss"):
        np.testing.assert_allclose(
            [r[key] for r in two if key in r], [r[key] for r in one if key in r], rtol=2e-3, err_msg=key
        )
    a, b = models.load(workdir).params, models.load(tmp_path / "one").params
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-3), a, b)
