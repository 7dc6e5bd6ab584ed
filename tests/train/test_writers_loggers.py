"""W&B and Aim beside the files: the same run after a resume, no network, and no failure that costs a run."""

import json
import os
import struct
import subprocess
import sys
import threading

import numpy as np
import pytest

from jax_diffusion.errors import UserError
from jax_diffusion.train import loggers, loop
from jax_diffusion.train.writers import MetricWriter

PICTURE = np.zeros((8, 8, 3), np.uint8)


class Fake:
    """A logger that keeps what it is told, and fails from the `broken`-th call on."""

    id = "same"

    def __init__(self, broken=None):
        self.calls, self.broken = [], broken

    def _call(self, *what):
        self.calls.append(what)
        if self.broken is not None and len(self.calls) >= self.broken:
            raise ConnectionError("no route to host\nand a second line")

    def write_scalars(self, step, scalars):
        self._call("scalars", step, dict(scalars))

    def write_images(self, step, images):
        self._call("images", step, list(images))

    def close(self):
        self._call("close")


def write(workdir, *others):
    writer = MetricWriter(workdir, loggers=others)
    writer.write_scalars(1, {"loss": 2.0, "images_per_s": 5.0})
    writer.write_images(1, {"samples": PICTURE})
    writer.rewind(0)
    writer.write_scalars(1, {"loss": 3.0})
    writer.close()


def test_loggers_are_told_what_the_files_are(tmp_path):
    fake = Fake()
    write(tmp_path, fake)
    assert fake.calls == [
        ("scalars", 1, {"loss": 2.0, "images_per_s": 5.0}),
        ("images", 1, ["samples"]),
        ("scalars", 1, {"loss": 3.0}),
        ("close",),
    ]


@pytest.mark.parametrize("broken", [1, 2, 4])
def test_a_logger_that_fails_is_one_warning(tmp_path, broken):
    said, fake = [], Fake(broken)
    write(tmp_path, loggers.Guarded("wandb", lambda: fake, said.append))
    assert len(said) == 1 and said[0].startswith("warning: wandb fails with ConnectionError: no route to host;")
    assert "\n" not in said[0] and len(fake.calls) == broken
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 3.0


def test_a_logger_that_cannot_begin_is_one_warning_and_the_user_s_mistake_an_error(tmp_path):
    def offline():
        raise TimeoutError("no answer")

    def mistaken():
        raise UserError("log in")

    said = []
    guarded = loggers.Guarded("aim", offline, said.append)
    guarded.write_scalars(1, {"loss": 1.0})
    guarded.close()
    assert said == ["warning: aim fails with TimeoutError: no answer; the run goes on without it"]
    with pytest.raises(UserError, match="log in"):
        loggers.Guarded("wandb", mistaken, said.append)


def test_a_logger_that_does_not_end_is_left_alone(monkeypatch):
    monkeypatch.setattr(loggers, "CLOSE_S", 0.05)
    said, held, fake = [], threading.Event(), Fake()
    fake.close = held.wait
    loggers.Guarded("wandb", lambda: fake, said.append).close()
    held.set()
    assert said == ["warning: wandb is still sending after 0 s; left alone"]


def test_a_missing_package_is_said_before_anything_is_compiled(tiny, tmp_path, monkeypatch):
    def absent(name):
        return None

    monkeypatch.setattr(loggers.importlib.util, "find_spec", absent)
    with pytest.raises(UserError, match=r"^--config.train.loggers=aim needs the package aim: pip install aim$"):
        loop.train(tiny("toy2d", "train.loggers=aim"), tmp_path / "run", log=lambda line: None)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    with pytest.raises(UserError, match="did you mean 'wandb'"):
        loggers.parse("wandbb")
    assert loggers.parse("") == []


def test_a_folder_of_that_name_is_no_package(monkeypatch, tmp_path):
    (tmp_path / "wandb").mkdir()
    spec = loggers.importlib.machinery.ModuleSpec("wandb", None)
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(UserError, match="pip install wandb"):
        loggers.parse("wandb")


# In a process of its own, which says of each connection where it goes: nothing may leave this machine.
TRAIN = """
import pathlib, socket, sys
connect, lookup = socket.socket.connect, socket.getaddrinfo
def connecting(self, address):
    assert self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost"), address
    return connect(self, address)
def looking(host, *rest, **options):
    print("LOOKED UP", host, flush=True)
    return lookup(host, *rest, **options)
socket.socket.connect, socket.getaddrinfo = connecting, looking
from jax_diffusion import config as configs
from jax_diffusion.train import loop
config = configs.override(configs.resolve("toy2d"), sys.argv[2:])
for stop in (10, 20):
    loop.train(config, pathlib.Path(sys.argv[1]), stop_at=stop)
"""


def train(workdir, arguments, name):
    fields = arguments(
        "toy2d", "train.steps=20", "train.eval_every=0", "train.sample_every=20", f"train.loggers={name}"
    )
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "AIM_"))}
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(workdir), *fields], capture_output=True, text=True, timeout=300, env=kept
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "LOOKED UP" not in done.stdout and "warning: " not in done.stdout
    return done.stdout


def logged(data):
    """The records of a .wandb file, which is a log as LevelDB's: blocks of 32 KiB, records cut at their ends."""
    at, parts = 7, []  # after the file's own header
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts.append(data[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts = []


def test_wandb_writes_offline_and_resumes_its_run(arguments, tmp_path):
    pytest.importorskip("wandb")
    out = train(tmp_path / "run", arguments, "wandb")
    assert out.count("nothing is sent; send it with `wandb sync ") == 2
    folders = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    kept = json.loads((tmp_path / "run" / "loggers.json").read_text())["wandb"]
    assert len(folders) == 2 and all(f.name.endswith(f"-{kept}") for f in folders)
    from wandb.proto import wandb_internal_pb2 as proto

    steps, pictures = [], 0
    for folder in folders:
        for data in logged((folder / f"run-{kept}.wandb").read_bytes()):
            record = proto.Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                item = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                steps += [(item["step"], item["loss"])] if "loss" in item else []
                pictures += any(key.startswith("samples") for key in item)
    written = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [(r["step"], pytest.approx(r["loss"])) for r in written] and pictures == 1


def test_aim_writes_and_resumes_its_run(arguments, tmp_path):
    aim = pytest.importorskip("aim")
    out = train(tmp_path / "runs" / "one", arguments, "aim")
    assert out.count("aim up --repo=") == 2
    kept = json.loads((tmp_path / "runs" / "one" / "loggers.json").read_text())["aim"]
    repository = aim.Repo(str(tmp_path / "runs"))
    run = aim.Run(kept, repo=repository, read_only=False, system_tracking_interval=None, capture_terminal_logs=False)
    assert run["config"]["train"]["loggers"] == "aim"
    losses = {m.name: m for m in run.metrics()}["loss"]
    written = [json.loads(line) for line in (tmp_path / "runs" / "one" / "metrics.jsonl").read_text().splitlines()]
    _, values = losses.values.sparse_list()
    assert sorted(values) == pytest.approx(sorted(r["loss"] for r in written))
    run.close()
