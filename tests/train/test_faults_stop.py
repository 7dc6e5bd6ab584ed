"""SIGTERM and preemption: saved, and a status that launch scripts start again; alike in all processes of a run."""

import os
import re
import signal
import socket
import subprocess
import sys

import pytest

from jax_diffusion.train import stored

ENDLESS = ["train.steps=1000000", "train.eval_every=0", "train.checkpoint_every=1000000", "train.log_every=5"]


def start(arguments, workdir, **env):
    command = [sys.executable, "-m", "jax_diffusion.cli.main", "train", "--config=toy2d", f"--workdir={workdir}"]
    return subprocess.Popen(
        [*command, *arguments("toy2d", *ENDLESS)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **env},
    )  # fmt: skip


def until_it_trains(process):
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.match(r"(\[\d/\d\] )?step ", line):
            return
    pytest.fail("".join(lines))


@pytest.fixture
def processes():
    started = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


def test_sigterm_saves_and_asks_to_be_started_again(arguments, tmp_path, processes):
    processes.append(start(arguments, tmp_path))
    until_it_trains(processes[0])
    processes[0].send_signal(signal.SIGTERM)
    out, _ = processes[0].communicate(timeout=300)
    assert processes[0].returncode == 75, out
    (step,) = stored.steps(tmp_path / "checkpoints")
    assert f"stopped (SIGTERM) and saved at step {step:,}; resume: jax-diffusion train" in out.splitlines()[-1]


def test_a_signal_to_one_process_stops_all_at_one_step(arguments, tmp_path, processes):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    for i in range(2):
        place = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(i)}
        processes.append(start(arguments, tmp_path, JAX_CPU_COLLECTIVES_IMPLEMENTATION="gloo", **place))
    for process in processes:
        until_it_trains(process)
    processes[1].send_signal(signal.SIGTERM)  # not to the one that writes
    outs = [process.communicate(timeout=300)[0] for process in processes]
    (step,) = stored.steps(tmp_path / "checkpoints")
    for process, out in zip(processes, outs, strict=True):
        assert process.returncode == 75, out
        assert f"stopped (SIGTERM) and saved at step {step:,}; resume" in out, out
