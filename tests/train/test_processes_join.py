"""Whom a process joins, by its environment, and what it says when they are not there."""

import io
import os
import socket
import subprocess
import sys

import pytest
from processes import COMMAND, Processes, environment, free_port

from jax_diffusion import processes
from jax_diffusion.cli import distributed
from jax_diffusion.errors import UserError

OURS = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2"}
SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[003-004]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1",
         "SLURM_LOCALID": "0"}  # fmt: skip
OMPI = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911", "OMPI_COMM_WORLD_SIZE": "3",
        "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}  # fmt: skip


@pytest.fixture
def env(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "JAX_DIFFUSION_", "JAX_COORD", "JAX_NUM_P", "JAX_PROC", "KUBE", "JOB_")):
            monkeypatch.delenv(name)
    return lambda variables: [monkeypatch.setenv(k, v) for k, v in variables.items()]


@pytest.mark.parametrize(
    "variables, place",
    [
        ({}, None),
        (OURS, ("a:1", 4, 2)),
        ({**OURS, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
        ({**OURS, "JAX_DIFFUSION_ALONE": "1"}, None),
        ({**OURS, "JAX_PROCESS_ID": "", "JOB_COMPLETION_INDEX": "3"}, ("a:1", 4, 3)),
        (SLURM, ("node003:61447", 2, 1)),
        ({**SLURM, "JAX_COORDINATOR_ADDRESS": "b:2"}, ("b:2", 2, 1)),
        ({**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        # Within sbatch, outside of srun: one process, whatever was reserved.
        ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}, None),
        (OMPI, ("10.96.0.1:62624", 3, 2)),
        # A pod by itself, a notebook's say.
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
    ],
)
def test_the_environment_says_where(env, variables, place):
    env(variables)
    found = distributed.place()
    assert (None if found is None else tuple(found)) == place


@pytest.mark.parametrize(
    "variables, words",
    [
        ({**OURS, "JAX_PROCESS_ID": ""}, "JAX_PROCESS_ID must be set too"),
        ({**OURS, "JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID=4 JAX_NUM_PROCESSES=4: give 0 <= id < number"),
        ({k: v for k, v in OMPI.items() if "hnp" not in k}, "Open MPI 5 does not say"),
    ],
)
def test_what_is_missing_is_said(env, variables, words):
    env(variables)
    with pytest.raises(UserError, match=words):
        distributed.place()


def test_a_pod_of_a_job_needs_the_package_or_the_address(env, monkeypatch):
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    env({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"})
    with pytest.raises(UserError, match=r'pip install "jax\[k8s\]"'):
        distributed.place()


def test_tpus_of_gke_tell_of_themselves(env, monkeypatch):
    """A pod of a JobSet on TPUs has both kinds of variables, and its own number is that of its slice alone."""
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    monkeypatch.setattr("jax._src.clusters.cloud_tpu_cluster.running_in_cloud_tpu_vm", True)
    monkeypatch.setattr("jax._src.clusters.cluster.running_in_cloud_tpu_vm", True)
    env({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1", "TPU_WORKER_HOSTNAMES": "a,b",
         "TPU_WORKER_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "localhost", "MEGASCALE_NUM_SLICES": "2",
         "MEGASCALE_SLICE_ID": "1"})  # fmt: skip
    assert tuple(distributed.place()) == ("localhost:8482", 4, 3)


def test_lines_of_others_begin_with_their_rank():
    out = io.StringIO()
    stream = distributed._Prefixed(out, "[1/2] ")
    for part in ("one ", "line\ntwo", "\n", "three\nfour\n"):
        stream.write(part)
    assert out.getvalue() == "[1/2] one line\n[1/2] two\n[1/2] three\n[1/2] four\n"


@pytest.mark.parametrize(
    "text, lost",
    [
        ("UNKNOWN: Gloo all-reduce failed: [external/gloo/tcp/pair.cc:538] Read error: Connection reset by peer", True),
        ("UNAVAILABLE: Failed to send RPC to coordination service", True),
        ("DEADLINE_EXCEEDED: Barrier timed out. Id: x", True),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate", False),
        ("cannot reshape array", False),
    ],
)
def test_what_counts_as_a_loss(monkeypatch, text, lost):
    assert not processes.is_loss(ValueError(text))  # of a process by itself nothing does
    monkeypatch.setattr(processes, "several", lambda: True)
    assert processes.is_loss(ValueError(text)) is lost


def test_of_two_the_other_is_gone_and_of_more_the_one_that_is_named(monkeypatch, tmp_path):
    (tmp_path / "checkpoints" / "1500").mkdir(parents=True)
    (tmp_path / "checkpoints" / "1600.orbax-checkpoint-tmp").mkdir()
    monkeypatch.setattr(processes, "_rank", lambda: (0, 2))
    assert processes.describe("UNKNOWN: broken", tmp_path) == (
        "process 1 of 2 is gone (broken); start all of them again: training resumes at step 1,500"
    )
    monkeypatch.setattr(processes, "_rank", lambda: (0, 8))
    assert processes.describe("/job:jax_worker/task:5 heartbeat", None).startswith("process 5 of 8 is gone (")
    assert processes.describe("Socket closed", tmp_path / "x").endswith("again: no step was saved yet")


def join(number, index, port, **more):
    """The exit status and the lines of one process that comes alone."""
    env = environment(number, index, port, **{"JAX_DIFFUSION_JOIN_TIMEOUT": "3", **more})
    done = subprocess.run(
        [*COMMAND, "train", "--config=toy2d", "--workdir=/nonexistent/run"],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
    )  # fmt: skip
    return done.returncode, done.stdout.splitlines()


def test_nobody_at_the_address():
    port = free_port()
    status, lines = join(2, 1, port)
    assert status == 2 and len(lines) == 1
    assert lines[0].startswith(
        f"[1/2] jax-diffusion: error: process 1 of 2 does not reach process 0 at 127.0.0.1:{port} "
    )
    assert "after 3 s" in lines[0] and "check that process 0 runs" in lines[0]


def test_nobody_comes():
    port = free_port()
    status, lines = join(2, 0, port)
    assert status == 2
    said = [line for line in lines if line.startswith("jax-diffusion: error:")]
    assert said == [
        f"jax-diffusion: error: not all 2 processes came to 127.0.0.1:{port} within 3 s: check that each was started, "
        "with the same address and number and an index of its own"
    ]


def test_the_port_is_taken():
    with socket.create_server(("", 0)) as taken:
        status, lines = join(2, 0, taken.getsockname()[1])
    assert status == 2 and len(lines) == 1 and "cannot listen on port" in lines[0] and "choose another" in lines[0]


@pytest.mark.parametrize(
    "more, words",
    [
        ({"JAX_COORDINATOR_ADDRESS": "127.0.0.1"}, "is no HOST:PORT"),
        (
            {"JAX_COORDINATOR_ADDRESS": "no.such.host.invalid:1234"},
            "does not reach process 0 at no.such.host.invalid:1234",
        ),
        ({"JAX_DIFFUSION_JOIN_TIMEOUT": "soon"}, "JAX_DIFFUSION_JOIN_TIMEOUT=soon: give whole seconds"),
    ],
)
def test_a_wrong_variable_is_one_line(more, words):
    status, lines = join(2, 1, free_port(), **{"JAX_DIFFUSION_JOIN_TIMEOUT": "1", **more})
    assert status == 2 and len(lines) == 1 and words in lines[0]


def test_a_mistake_of_one_ends_it_at_once(tmp_path):
    """Not after JAX has waited for the others; and they hear of it."""
    (tmp_path / "file").touch()
    command = ("train", "--config=toy2d", f"--workdir={tmp_path / 'run'}", "--config.train.batch_size=3")
    with Processes(2, *command, JAX_DIFFUSION_HEARTBEAT_TIMEOUT="600") as two:
        assert two.end() == [2, 2]
        assert all("train.batch_size=3 does not divide over 2 devices" in p.said for p in two)


def test_the_last_line_is_written_in_one_piece():
    """Where print would write its end apart, a native thread's complaint could come between."""
    program = """
import os, sys
from jax_diffusion import processes
pieces = []
sys.stderr.write = pieces.append
processes._rank = lambda: (0, 2)
os._exit = lambda status: print(status, pieces)
processes.leave("Socket closed", None)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONUNBUFFERED": "1"}, capture_output=True, text=True
    )
    line = "jax-diffusion: error: process 1 of 2 is gone (Socket closed); start all of them again\n"
    assert done.stdout == f"{processes.RESUME} {[line]}\n", done.stderr
