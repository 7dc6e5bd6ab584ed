"""One framework in one process: lines of JSON in, lines of JSON out.

    {"do": "prepare", "variant": "eager", ...}   ->   {"ok": {...}}   or   {"error": "...", "mistake": false}

A worker that is not asked for anything sleeps in `read`, so the one that is timed has the cores to itself. What
libraries print goes to stderr, which the parent keeps in a file.
"""

import contextlib
import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

from jax_diffusion.errors import UserError

SIDES = {"jax": "jax_diffusion.bench.jax_side", "torch": "jax_diffusion.bench.torch_side"}
LAST_LINES = 4


class Died(Exception):
    """A worker ended unasked; the text says how, with the last lines of its stderr."""


class Failed(Exception):
    """A worker could not do what it was asked for, and goes on."""


class Worker:
    """A framework's process, seen from the parent. name: the module's key in SIDES, or a module."""

    def __init__(self, name: str, folder: str | os.PathLike, threads: int, env: dict[str, str] | None = None):
        self.name, self.folder, self.threads, self.env = name, pathlib.Path(folder), threads, env or {}
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        self.log = tempfile.NamedTemporaryFile(  # noqa: SIM115
            "w+",
            dir=self.folder,
            prefix=f"{self.name.rsplit('.', 1)[-1]}_",
            suffix=".log",
            delete=False,
            errors="replace",
        )
        # A session of its own: a Ctrl-C is the parent's alone, and what a worker starts can be ended with it.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jax_diffusion.bench.worker", self.name, str(self.threads), str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, **self.env},
            start_new_session=True,
        )

    def call(self, do: str, **arguments: Any) -> Any:
        """The answer. Raises Failed, UserError for a mistake of the user's, or Died."""
        if self.process is None:
            self.start()
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except (BrokenPipeError, ConnectionResetError):
            line = ""
        if not line.endswith("\n"):
            raise Died(self._last_words(do))
        answer = json.loads(line)
        if "error" in answer:
            raise (UserError if answer["mistake"] else Failed)(answer["error"])
        return answer["ok"]

    def _last_words(self, do: str) -> str:
        status = self.process.wait()
        self.stop()
        how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        lines = [line.strip() for line in pathlib.Path(self.log.name).read_text(errors="replace").splitlines()]
        said = " | ".join([line for line in lines if line][-LAST_LINES:])
        return f"the {self.name} worker died ({how}) while asked to {do}" + (
            f"; its last lines: {said}" if said else ""
        )

    def stop(self) -> None:
        """Ends the worker and whatever it started; harmless where it is gone."""
        if self.process is None:
            return
        process, self.process = self.process, None
        # Not asked to quit: a framework's own shutdown takes seconds, and nothing of it is wanted.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout, self.log):
            with contextlib.suppress(OSError):  # what was not read any more
                pipe.close()


def first_line(error: BaseException) -> str:
    """What went wrong, in one line of moderate length."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}".rstrip(": ")


def serve(side: Any, requests, answers) -> None:
    """Answers each request by the method of its name, until the parent closes the pipe."""
    for line in requests:
        arguments = json.loads(line)
        try:
            answer = {"ok": getattr(side, arguments.pop("do"))(**arguments)}
        except UserError as e:
            answer = {"error": str(e), "mistake": True}
        except Exception as e:
            import traceback

            traceback.print_exc()  # for the log
            answer = {"error": first_line(e), "mistake": False}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def peak_memory() -> int:
    """The most memory this process has held, in bytes, since it began or since `restart_peak`."""
    with contextlib.suppress(OSError, StopIteration):
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def restart_peak() -> None:
    """Forgets earlier peaks, and what a compiler has freed, where Linux lets a process do so."""
    with contextlib.suppress(OSError, AttributeError):
        import ctypes

        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")


def clock(run, seconds: float = 0.0, least: int = 1) -> float:
    """The mean seconds of run() over `least` calls or more, until `seconds` have gone by."""
    started, calls = time.perf_counter(), 0
    while calls < least or time.perf_counter() - started < seconds:
        run()
        calls += 1
    return (time.perf_counter() - started) / calls


def main(name: str, threads: str, folder: str) -> None:
    # Both frameworks are given the same cores, before either counts them.
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, allowed[: int(threads)])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module = importlib.import_module(SIDES.get(name, name))
    serve(module.Side(int(threads), pathlib.Path(folder)), sys.stdin, answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
