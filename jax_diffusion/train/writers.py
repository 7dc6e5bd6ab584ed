"""Where the numbers go: metrics.jsonl and speed.jsonl always, TensorBoard beside them. clu's method names.

A scalar goes to one of two files by its name alone (`is_clock`):

    metrics.jsonl   what is a function of the step: loss, grad_norm, learning_rate, val_loss, ...; lines of
                    {"step": n, NAME: v, ...}. A resumed run first cuts it back to the step it resumes from, so that in
                    the end the file is, byte for byte, that of a run which was never interrupted.
    speed.jsonl     what depends on the clock and the machine: {"step": n, "time": s, NAME: v, ...}, time in seconds
                    since 1970. Append-only: after a resume steps come again, with a later time.

A new metric that depends on the machine (a duration, a rate, memory, waiting) has to be named in CLOCK, or start with
one of its names and a slash ("memory/peak"). TensorBoard gets both.

clu.metric_writers itself needs tensorflow, which this project does without.
"""

import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jax_diffusion.errors import UserError
from jax_diffusion.io.whole import whole
from jax_diffusion.train.loggers import Logger

CLOCK = frozenset({
    "time", "seconds", "images_per_s", "steps_per_s", "flops_per_s", "mfu", "input_wait", "input", "memory",
    "memory_peak", "host_memory", "device_memory_peak", "speed", "watchdog",
})  # fmt: skip


def is_clock(name: str) -> bool:
    """Whether a metric of this name depends on the clock and the machine: see the top of this file."""
    return name.split("/")[0] in CLOCK


def read_lines(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """The records of a .jsonl file of this module, in order; lines that are none, a torn last one say, are left out."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return
    for line in text.splitlines():
        if record := _record(line):
            yield record


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _trim(path: pathlib.Path, last: int | None) -> None:
    """Cuts a .jsonl file back to the whole lines of steps up to `last` (None: of any step), or leaves it untouched."""
    try:
        old = path.read_bytes()
    except FileNotFoundError:
        return
    lines = old[: old.rfind(b"\n") + 1].splitlines(keepends=True)
    kept = [line for line in lines if (r := _record(line)) and (last is None or r["step"] <= last)]
    new = b"".join(kept)
    if new != old:
        with whole(path, lasting=True) as draft:
            draft.write_bytes(new)


def _board_class() -> Any:
    """tensorboardX's SummaryWriter, imported as if there were no torch, which it wants for the name of a type alone:
    two seconds of every start."""
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hide:
            del sys.modules["torch"]
    return SummaryWriter


class MetricWriter:
    """Writes scalars and pictures under workdir; on other processes than the first it writes nothing."""

    def __init__(self, workdir: pathlib.Path, active: bool = True, start: int = 0, loggers: Sequence[Logger] = ()):
        """start: the step the run starts from; whatever is there of later steps is of a run that was cut off.

        loggers: who else is told (loggers.py); closed with this.
        """
        self.workdir, self._loggers = workdir, list(loggers)
        self._files: dict[str, Any] = {}
        self._board: Any = None
        if active:
            self._open(start)

    def _open(self, start: int) -> None:
        board_class = _board_class()
        try:
            for name, last in (("metrics", start), ("speed", None)):
                path = self.workdir / f"{name}.jsonl"
                _trim(path, last)
                self._files[name] = path.open("ab", buffering=0)
            # TensorBoard drops what it has of later steps.
            self._board = board_class(str(self.workdir / "tensorboard"), purge_step=start + 1)
        except OSError as e:
            raise _unwritable(self.workdir, e) from e

    def rewind(self, step: int) -> None:
        """Forgets what was written of steps after `step`, from which the run goes on."""
        if self._files:
            self._close_files()
            self._open(step)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        if not self._files:
            return
        scalars = {k: float(v) for k, v in scalars.items()}
        clock = {k: v for k, v in scalars.items() if is_clock(k)}
        self._write("metrics", step, {k: v for k, v in scalars.items() if k not in clock})
        self._write("speed", step, clock and {"time": round(time.time(), 3), **clock})
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)
        for logger in self._loggers:
            logger.write_scalars(step, scalars)

    def _write(self, name: str, step: int, values: Mapping[str, float]) -> None:
        if not values:
            return
        file, line = self._files[name], (json.dumps({"step": step, **values}) + "\n").encode()
        try:
            while line:
                line = line[file.write(line) :]
        except OSError as e:
            raise _unwritable(file.name, e) from e

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """images: name -> uint8 [H, W, 3]."""
        if self._board is not None:
            for name, image in images.items():
                self._board.add_image(name, image, step, dataformats="HWC")
        for logger in self._loggers:
            logger.write_images(step, images)

    def flush(self) -> None:
        """Returns when all that was written is on the disk: before a checkpoint of the same step counts."""
        try:
            for file in self._files.values():
                os.fsync(file.fileno())
            if self._board is not None:
                self._board.flush()
        except OSError as e:
            raise _unwritable(self.workdir, e) from e

    def close(self) -> None:
        self._close_files()
        while self._loggers:
            self._loggers.pop().close()

    def _close_files(self) -> None:
        for file in self._files.values():
            file.close()
        if self._board is not None:
            self._board.close()
        self._files, self._board = {}, None


def _unwritable(path: str | pathlib.Path, e: OSError) -> UserError:
    return UserError(f"{path} cannot be written: {e.strerror or e}; make room or give another --workdir, then resume")
