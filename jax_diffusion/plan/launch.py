"""Runs the compiling process and hands on what it tells: compilers want their environment set before JAX starts."""

import contextlib
import dataclasses
import json
import os
import pathlib
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

from jax_diffusion.errors import UserError
from jax_diffusion.plan import targets
from jax_diffusion.train.report import duration


@dataclasses.dataclass(frozen=True)
class Request:
    """What to compile."""

    topology: str
    config: str  # configs.to_json
    shape: tuple[int, ...]
    classes: int
    cache: str = ""  # folder of compiled programs; "" keeps none
    sampler: bool = True
    search: bool = True
    sweep: bool = False


def default_cache() -> pathlib.Path:
    """Where compiled programs' texts are kept: jax_diffusion/plans in the user's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (pathlib.Path(root) if os.path.isabs(root) else pathlib.Path.home() / ".cache") / "jax_diffusion" / "plans"


class Watch:
    """A line on stderr that says what is being compiled and for how long, of several also the time left; silent for two
    seconds."""

    def __init__(self):
        self.tty = sys.stderr.isatty()
        self.period = 0.5 if self.tty else 30.0
        self.text, self.left, self.shown = "", "", 0.0
        self.first = self.began = time.monotonic()

    def start(self, text: str, of: list[int] | None = None) -> None:
        """of: [3, 12], the third of twelve."""
        self.clear()
        self.began, self.shown = time.monotonic(), 0.0
        self.text, self.left = text, ""
        if of:
            done, total = of[0] - 1, of[1]
            self.text = f"{of[0]}/{total}: {text}"
            if done:
                self.left = f", about {duration((self.began - self.first) / done * (total - done))} left"

    def tick(self) -> None:
        now = time.monotonic()
        if self.text and now - self.began > 2 and now - self.shown > self.period:
            self.shown = now
            line = f"compiling: {self.text}: {duration(now - self.began)} elapsed{self.left}"
            sys.stderr.write(f"\r\x1b[K{line}" if self.tty else f"{line}\n")
            sys.stderr.flush()

    def clear(self) -> None:
        if self.tty and self.shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def events(request: Request) -> Iterator[dict]:
    """Starts the process and yields its events but "stage", which become a progress line. Raises UserError.

    However this ends, Ctrl-C included, the process is gone.
    """
    environment = targets.environment(request.topology, os.environ)
    # The package of this process, wherever it was imported from.
    paths = [str(pathlib.Path(__file__).parents[2]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    with tempfile.TemporaryFile("w+") as noise:
        process = subprocess.Popen(
            [sys.executable, "-m", "jax_diffusion.plan.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=noise, env=environment, text=True,
            start_new_session=True,  # Ctrl-C is this process's to handle
        )  # fmt: skip
        watch = Watch()
        try:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps(dataclasses.asdict(request)) + "\n")
            process.stdin.flush()
            yield from _events(process, watch)
        except BrokenPipeError:
            pass  # it died at once: said below
        finally:
            watch.clear()
            if process.poll() is None:
                process.kill()
            process.wait()
            for pipe in filter(None, (process.stdin, process.stdout)):
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        if process.returncode:
            noise.seek(0)
            lines = [line.strip() for line in noise.read().splitlines() if line.strip()] or ["no message"]
            # A crash ends with a list of frames; what failed stands before it.
            lines = [line for line in lines if re.search(r"Check failed|[Ee]rror|^F\d{4} ", line)] or lines
            raise UserError(
                f"--topology={request.topology}: the compiling process ended with status {process.returncode}: "
                f"{lines[-1][:500]}"
            )


def _events(process: subprocess.Popen, watch: Watch) -> Iterator[dict]:
    lines: queue.Queue = queue.Queue()

    def read():
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=0.5)
        except queue.Empty:
            watch.tick()
            continue
        if line is None:
            process.wait()
            return
        event = json.loads(line)
        if "stage" in event:
            watch.start(event["stage"], event["of"])
        elif "error" in event:
            raise UserError(event["error"])
        elif "done" in event:
            process.wait()
            return
        else:
            watch.clear()
            yield event
