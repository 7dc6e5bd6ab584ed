"""A workdir's own files: config.json and dataset.json, read and written whole, and the lock of its one trainer."""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from jax_diffusion import config as configs
from jax_diffusion.errors import UserError
from jax_diffusion.io.whole import whole


def read_config(workdir: pathlib.Path) -> configs.ConfigDict:
    """config.json. FileNotFoundError where there is none, UserError where it is damaged."""
    path = workdir / "config.json"
    try:
        return configs.from_json(path.read_text())
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise _damaged(path, e) from e


def read_facts(workdir: pathlib.Path) -> dict[str, Any]:
    """dataset.json, {} where there is none yet. UserError where it is damaged."""
    path = workdir / "dataset.json"
    try:
        facts = json.loads(path.read_text())
        shape, names = facts["shape"], facts["class_names"]
        if not (all(type(n) is int and n > 0 for n in shape) and all(isinstance(n, str) for n in names)):
            raise ValueError(f"shape {shape} and class_names {names}")
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as e:
        raise _damaged(path, e) from e
    return facts


def read_meta(workdir: str | pathlib.Path) -> tuple[configs.ConfigDict, dict[str, Any]]:
    """The config and the data's facts ("shape", "class_names") of a workdir. UserError where there are none."""
    workdir = pathlib.Path(workdir)
    try:
        config, facts = read_config(workdir), read_facts(workdir)
        if not facts:
            raise FileNotFoundError
    except FileNotFoundError:
        raise UserError(
            f"--workdir={workdir} holds no training run: train one with "
            f"`jax-diffusion train --config=digits --workdir={workdir}`"
        ) from None
    return config, facts


def _damaged(path: pathlib.Path, e: Exception) -> UserError:
    why = f"{type(e).__name__}: {e}".splitlines()[0]
    return UserError(
        f"{path} is damaged or not written by jax-diffusion ({why}): put a copy back, or use another --workdir"
    )


def save_facts(workdir: pathlib.Path, config: configs.ConfigDict, facts: dict[str, Any]) -> None:
    """config.json, and dataset.json with at least "shape" and "class_names"."""
    for name, text in (("dataset", json.dumps(facts, indent=2) + "\n"), ("config", configs.to_json(config))):
        with whole(workdir / f"{name}.json", lasting=True) as draft:
            draft.write_text(text)


_HELD: set[pathlib.Path] = set()  # by this process, which the kernel would let in twice


class Lock:
    """A context manager that process 0 of the one trainer in a workdir holds: UserError where another one does.

    On one machine the kernel's lock on the file `train.lock` decides, which goes with the process that holds it,
    however that ends (lockf, not flock: workers that outlive it do not inherit it). Machines that share a folder do not
    always share its locks, so the file also says who holds it, and is touched every `beat` seconds: one that another
    machine has left behind is taken over when nobody has touched it for `patience` seconds. Only trainers look at it.
    """

    NAME = "train.lock"

    def __init__(
        self, workdir: pathlib.Path, log: Callable[[str], None] = print, *, beat: float = 10.0, patience: float = 45.0
    ):
        self.workdir, self.path, self.log = workdir, workdir / self.NAME, log
        self.beat, self.patience = beat, patience
        self._file: Any = None
        self._done = threading.Event()

    def __enter__(self):
        if jax.process_index() == 0:
            try:
                self.workdir.mkdir(parents=True, exist_ok=True)
                self._take()
            except OSError as e:
                raise UserError(f"--workdir={self.workdir} cannot be written: {e.strerror or e}") from e
            self._thread = threading.Thread(target=self._touch, name="workdir lock", daemon=True)
            self._thread.start()
        return self

    def _take(self) -> None:
        if self.path.resolve() in _HELD:
            raise UserError(f"--workdir={self.workdir} is being trained in by this very process: use another --workdir")
        while True:
            file = self.path.open("a+b")
            kernel = True
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise self._refusal(file) from None
            except OSError as e:
                if e.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
                    raise
                kernel = False  # a file system without locks
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                    break
            file.close()  # its holder was just leaving, and took the file along
        holder = _holder(file)
        if holder and (holder["host"] != socket.gethostname() or not kernel):
            self._wait(file, holder)
        me = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": datetime.datetime.now().isoformat(" ", "seconds"),
        }
        file.truncate(0)
        file.write(json.dumps(me).encode())
        file.flush()
        self._file = file
        _HELD.add(self.path.resolve())

    def _wait(self, file, holder: dict[str, Any]) -> None:
        """Until the holder, on another machine, has not been heard of for long enough."""
        self.log(f"{self.path} is of {_name(holder)}: waiting {self.patience:.0f} s, in case it is still alive")
        before, end = self.path.stat().st_mtime_ns, time.monotonic() + self.patience
        while time.monotonic() < end:
            self._done.wait(min(self.beat, self.patience) / 4)
            if self.path.stat().st_mtime_ns != before:
                raise self._refusal(file)
        self.log("it is not: taking over")

    def _refusal(self, file) -> UserError:
        holder = _holder(file)
        file.close()
        return UserError(
            f"--workdir={self.workdir} is being trained in by {_name(holder)}: stop that run first, or use another "
            "--workdir"
        )

    def _touch(self) -> None:
        while not self._done.wait(self.beat):
            with contextlib.suppress(OSError):
                os.utime(self._file.fileno())

    def __exit__(self, *exc):
        self._done.set()
        if self._file is not None:
            self._thread.join()
            with contextlib.suppress(OSError):
                self.path.unlink()  # while it is held
            self._file.close()
            _HELD.discard(self.path.resolve())


def _holder(file) -> dict[str, Any]:
    """What the lock's file says; {} where it says nothing (yet)."""
    file.seek(0)
    try:
        holder = json.loads(file.read())
        return {"host": str(holder["host"]), "pid": int(holder["pid"]), "since": str(holder["since"])}
    except (ValueError, KeyError, TypeError):
        return {}


def _name(holder: dict[str, Any]) -> str:
    return "process {pid} on {host} since {since}".format(**holder) if holder else "another process"
