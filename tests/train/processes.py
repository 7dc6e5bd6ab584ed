"""Real processes that meet on 127.0.0.1, for tests: start several, wait for a line of one, signal one, read what all
said.

    with Processes(2, "train", "--config=toy2d", f"--workdir={workdir}", *fields) as two:
        two[0].wait_for("step ")            # a line with these words, from stdout or stderr; fails after LIMIT
        os.kill(two[1].pid, signal.SIGKILL)
        assert two[0].ends() == 75          # its exit status; fails (and ends it) after LIMIT
        assert "process 1 of 2 is gone" in two[0].said

Each process holds one CPU device (with more than one, gloo may deadlock), and they meet at a free port. Leaving the
block kills what still runs: SIGTERM alone may not end a process that has joined others. `environment` is what a script
of one's own (`program=`) needs to join.
"""

import os
import pathlib
import socket
import subprocess
import sys
import threading
import time

LIMIT = 600  # seconds; a loaded machine is no failure

COMMAND = (str(pathlib.Path(sys.executable).with_name("jax-diffusion")),)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(number: int, index: int, port: int, **more: str) -> dict[str, str]:
    """Of process `index` of `number`."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(number),
        "JAX_PROCESS_ID": str(index),
        **more,
    }


class Process:
    """One of them. `said`: all it has written so far, stdout and stderr in turn."""

    def __init__(self, command: list[str], env: dict[str, str]):
        self._lines: list[str] = []
        self._changed = threading.Condition()
        self._process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.pid = self._process.pid
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._process.stdout:
            with self._changed:
                self._lines.append(line)
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    @property
    def said(self) -> str:
        with self._changed:
            return "".join(self._lines)

    def wait_for(self, words: str, times: int = 1, limit: float = LIMIT) -> str:
        """The first line with these words (or the one that makes it so many times), once it is there."""
        end = time.monotonic() + limit
        with self._changed:
            while True:
                found = [line for line in self._lines if words in line]
                if len(found) >= times:
                    return found[times - 1]
                left = end - time.monotonic()
                assert left > 0 and self._reader.is_alive(), f"no line with {words!r}:\n{''.join(self._lines)}"
                self._changed.wait(min(left, 1.0))

    def ends(self, limit: float = LIMIT) -> int:
        """Its exit status, -9 for one that was killed."""
        try:
            status = self._process.wait(limit)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {limit} s:\n{self.said}") from None
        self._reader.join(10)
        return status

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


class Processes:
    """`number` processes of one command. A context manager and a sequence of Process."""

    def __init__(self, number: int, *arguments: str, program: tuple[str, ...] = COMMAND, **env: str):
        port = free_port()
        command = [*map(str, program), *map(str, arguments)]
        self._all = [Process(command, environment(number, i, port, **env)) for i in range(number)]

    def __getitem__(self, index: int) -> Process:
        return self._all[index]

    def __len__(self) -> int:
        return len(self._all)

    def end(self, limit: float = LIMIT) -> list[int]:
        """The exit statuses of all, in order."""
        return [p.ends(limit) for p in self._all]

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *exc) -> None:
        for p in self._all:
            p.kill()
