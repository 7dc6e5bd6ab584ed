"""One trainer a workdir, and refusals that leave every byte where it was."""

import contextlib
import json
import os
import pathlib
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading

import jax
import jax.numpy as jnp
import pytest

from jax_diffusion import model as models
from jax_diffusion.errors import UserError
from jax_diffusion.train import loop, stored
from jax_diffusion.train.checkpoint import Checkpointer
from jax_diffusion.train.state import TrainState
from jax_diffusion.train.workdir import Lock
from jax_diffusion.train.writers import MetricWriter, read_lines

FIELDS = ["train.steps=30", "train.checkpoint_every=10", "train.eval_every=0", "model.width=8"]


@pytest.fixture(scope="module")
def begun(tiny, tmp_path_factory):
    """A run of 30 steps that stopped after 20."""
    workdir = tmp_path_factory.mktemp("begun")
    loop.train(tiny("toy2d", *FIELDS), workdir, stop_at=20, log=lambda line: None)
    return workdir


@pytest.fixture
def workdir(begun, tmp_path):
    return pathlib.Path(shutil.copytree(begun, tmp_path / "run"))


def everything(workdir):
    """Every file's bytes and time."""
    files = [p for p in sorted(workdir.rglob("*")) if p.is_file()]
    return {str(p.relative_to(workdir)): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def edit(path, **fields):
    content = json.loads(path.read_text())
    for name, value in fields.items():
        group = content
        *groups, last = name.split("__")
        for g in groups:
            group = group[g]
        group[last] = value
    path.write_text(json.dumps(content))


def smaller(workdir):
    edit(workdir / "config.json", model__width=4)


def more_data(workdir):
    edit(workdir / "dataset.json", train_examples=7)


REFUSALS = {
    "config": (None, ["optim.learning_rate=0.5", "seed=3"],
               r"another config \(optim.learning_rate: .* -> 0.5; seed: 0 -> 3\): use another workdir, or resume"),
    "model": (smaller, None, r"checkpoint 20 does not fit this config, it is of another model: params/\S+ is float32 "
              r"\[.*8.*\] in the checkpoint and float32 \[.*4.*\] here; use another --workdir"),
    "data": (more_data, None, r"started on other data \(its examples: 7, now 100000\)"),
    "half a config.json": (lambda w: (w / "config.json").write_text('{"seed": 0, "da'), None,
                           r"run/config.json is damaged or not written by jax-diffusion \(JSONDecodeError"),
    "a foreign config.json": (lambda w: (w / "config.json").write_text('{"architectures": ["x"]}'), None,
                              r"run/config.json is damaged or not written by jax-diffusion"),
    "bytes as config.json": (lambda w: (w / "config.json").write_bytes(b"\xff\xfe\0"), None,
                             r"run/config.json is damaged"),
    "a list as dataset.json": (lambda w: (w / "dataset.json").write_text("[1]"), None, r"run/dataset.json is damaged"),
    "a wrong dataset.json": (lambda w: edit(w / "dataset.json", shape=["two"]), None, r"run/dataset.json is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_is_one_line_and_changes_nothing(workdir, tiny, case):
    spoil, fields, message = REFUSALS[case]
    if spoil is not None:
        spoil(workdir)
    before = everything(workdir)
    with pytest.raises(UserError, match=message) as e:
        loop.train(tiny("toy2d", *FIELDS, *fields) if fields else None, workdir, log=lambda line: None)
    assert "\n" not in str(e.value)
    assert everything(workdir) == before
    if case not in ("config", "data"):  # what reads the run is told as well
        with pytest.raises(UserError):
            models.load(workdir)


@pytest.mark.parametrize("field", ["data.path=/elsewhere", "data.max_bytes=1", "train.log_every=3", "mesh.fsdp=1",
                                   "sampling.steps=2", "train.keep=9", "train.eval_every=5"])  # fmt: skip
def test_what_may_change(workdir, tiny, field):
    from jax_diffusion.train import setup

    assert setup.prepare(setup.settle_config(tiny("toy2d", *FIELDS, field), workdir), workdir)


# ---- the lock

HOLD = """
import pathlib, sys
from jax_diffusion.train.workdir import Lock
with Lock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that trains in tmp_path."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_trainer_is_locked_out(holder, tmp_path):
    before = everything(tmp_path)
    said = f"is being trained in by process {holder.pid} on {socket.gethostname()} since 2"
    with pytest.raises(UserError, match=said), Lock(tmp_path):
        pass
    assert everything(tmp_path).keys() == before.keys() == {Lock.NAME}
    assert everything(tmp_path)[Lock.NAME][0] == before[Lock.NAME][0]
    holder.kill()  # as kill -9: it goes without a word
    holder.wait()
    assert (tmp_path / Lock.NAME).exists()
    with Lock(tmp_path, log=pytest.fail), pytest.raises(UserError, match="by this very process"):  # at once
        Lock(tmp_path).__enter__()
    assert not (tmp_path / Lock.NAME).exists()


def test_another_machines_lock_is_waited_for(tmp_path):
    path, lines, stop = tmp_path / Lock.NAME, [], threading.Event()
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7, "since": "yesterday"}))

    def alive():
        while not stop.wait(0.01):
            os.utime(path)

    thread = threading.Thread(target=alive)
    thread.start()
    with pytest.raises(UserError, match="process 7 on elsewhere since yesterday"):
        Lock(tmp_path, lines.append, beat=0.1, patience=300).__enter__()
    stop.set()
    thread.join()
    with Lock(tmp_path, lines.append, beat=0.1, patience=0.3):
        assert lines[-1] == "it is not: taking over"
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_readers_are_not_locked_out(workdir):
    with Lock(workdir):
        assert models.load(workdir).step == 20


# ---- disks


@contextlib.contextmanager
def full_disk(size):
    """No file may grow beyond `size` bytes: as a full disk, in the middle of a write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def state(step):
    w = {"w": jax.random.normal(jax.random.key(step), (50_000,))}
    return TrainState(jnp.int32(step), w, (), w, ())


def fails_once(checkpoints):
    checkpoints.save(state(2))  # the error comes later, in the background


def fails_before_the_next(checkpoints):
    checkpoints.save(state(2))
    checkpoints.save(state(3))


def fails_while_something_else_does(checkpoints):
    checkpoints.save(state(2))
    raise UserError("checkpoint 2 could not be saved in checkpoints: the first thing that went wrong; "
                    "the newest one there is 1. Mend that")  # fmt: skip


def copy_if_there(source, destination):
    with contextlib.suppress(FileNotFoundError):
        shutil.copy2(source, destination)


@pytest.mark.parametrize("way", [fails_once, fails_before_the_next, fails_while_something_else_does])
def test_a_full_disk_ends_the_run_and_not_its_checkpoints(tmp_path, way):
    with Checkpointer(tmp_path / "full") as checkpoints:
        checkpoints.save(state(1))
    said = r"checkpoint 2 could not be saved in .*checkpoints: .*; the newest one there is 1\. Mend that"
    checkpointer = Checkpointer(tmp_path / "full", log=lambda line: None)
    with full_disk(20_000), pytest.raises(UserError, match=said) as e, checkpointer as checkpoints:
        way(checkpoints)
    assert "\n" not in str(e.value)
    assert ("the first thing" in str(e.value)) == (way is fails_while_something_else_does)
    # There is room again. (A copy: what failed may still be writing, in this process.)
    folder = shutil.copytree(tmp_path / "full", tmp_path / "room", copy_function=copy_if_there) / "checkpoints"
    assert stored.steps(folder) == [1]
    with Checkpointer(tmp_path / "room") as checkpoints:
        checkpoints.save(state(2))
    assert stored.steps(folder) == [1, 2] and not list(folder.glob("*tmp*"))


def test_a_torn_line_of_the_metrics_is_dropped(tmp_path):
    with contextlib.closing(MetricWriter(tmp_path)) as writer:
        writer.write_scalars(1, {"loss": 0.5, "images_per_s": 7.0})
    size = (tmp_path / "metrics.jsonl").stat().st_size
    writer = MetricWriter(tmp_path, start=1)
    with full_disk(size + 9), pytest.raises(UserError, match=r"metrics\.jsonl cannot be written: File too large"):
        writer.write_scalars(2, {"loss": 0.25})
    writer.close()
    assert (tmp_path / "metrics.jsonl").stat().st_size == size + 9
    with contextlib.closing(MetricWriter(tmp_path, start=2)) as writer:
        writer.write_scalars(2, {"loss": 0.25})
    assert list(read_lines(tmp_path / "metrics.jsonl")) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    assert [r["images_per_s"] for r in read_lines(tmp_path / "speed.jsonl")] == [7.0]


def test_metrics_of_later_steps_are_cut_off(tmp_path):
    with contextlib.closing(MetricWriter(tmp_path)) as writer:
        for step in (10, 20, 30):
            writer.write_scalars(step, {"loss": 1 / step, "mfu": 0.5})
    with contextlib.closing(MetricWriter(tmp_path, start=20)) as writer:
        writer.write_scalars(25, {"loss": 0.5})
        writer.rewind(10)
        writer.write_scalars(15, {"loss": 0.25})
    assert [r["step"] for r in read_lines(tmp_path / "metrics.jsonl")] == [10, 15]
    speed = list(read_lines(tmp_path / "speed.jsonl"))
    assert [r["step"] for r in speed] == [10, 20, 30] and all(r["time"] > 1e9 and "loss" not in r for r in speed)


@contextlib.contextmanager
def nobody(folder):
    """As a user who may read `folder` and not write there."""
    root = os.geteuid() == 0
    modes = [(p, p.stat().st_mode) for p in (folder, *folder.rglob("*")) if p.is_dir()]
    for p, _ in modes:
        p.chmod(0o555)
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        for p, mode in modes:
            p.chmod(mode)


def test_a_read_only_workdir_is_said(begun):
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are for one user alone
        os.chmod(folder, 0o755)
        workdir = pathlib.Path(shutil.copytree(begun, pathlib.Path(folder) / "run"))
        before = everything(workdir)
        with nobody(workdir), pytest.raises(UserError, match=r"--workdir=.*run cannot be written: Permission denied"):
            loop.train(None, workdir, log=lambda line: None)
        assert everything(workdir) == before
        with nobody(workdir):
            assert models.load(workdir).step == 20  # reading takes no leave
