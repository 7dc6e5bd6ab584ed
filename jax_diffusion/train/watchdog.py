"""A thread that says which of the two it is when training stands still: the input or the devices. It ends nothing."""

import contextlib
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import NamedTuple

from jax_diffusion.train.report import duration

FIRST = 5  # as much patience with the first batch and the first step: workers start, programs are loaded
FRAMES = 12  # of a stack, the innermost


class _Wait(NamedTuple):
    what: str  # "input" or "step"
    step: int
    since: float  # of time.monotonic
    thread: int


class Watchdog:
    """Watches what the loop does within `watching`, and nothing else: not compiling, validation or checkpoints.

    seconds: of one wait until it is reported, and after twice, four times, ... as long again; 0 reports nothing.
    log: called from the thread with each line: what stands still, and the stack of the thread it waits for.
    A context manager, whose exit ends the thread.
    """

    def __init__(self, seconds: float, log: Callable[[str], None]):
        self.seconds, self.log = seconds, log
        self._wait: _Wait | None = None
        self._seen: set[str] = set()  # what has come once
        self._told: tuple[_Wait | None, float] = (None, 0.0)  # the wait last reported, and when to report it again
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def watching(self, what: str, step: int) -> Iterator[None]:
        """Around a wait for "input", or around a "step": its dispatch and the wait for those before it."""
        wait = self._wait = _Wait(what, step, time.monotonic(), threading.get_ident())
        try:
            yield
        finally:
            self._wait = None
            self._seen.add(what)
            if self._told[0] is wait:
                self.log(f"step {step:,}: goes on after {duration(time.monotonic() - wait.since)}")

    def _watch(self) -> None:
        while not self._ended.wait(self.seconds / 4):
            wait = self._wait
            if wait is None:
                continue
            patience = self.seconds * (1 if wait.what in self._seen else FIRST)
            waited, (told, again) = time.monotonic() - wait.since, self._told
            if waited >= (again if told is wait else patience):
                self._told = wait, 2 * waited
                self._report(wait, waited)

    def _report(self, wait: _Wait, waited: float) -> None:
        said = f"warning: step {wait.step:,} has waited {duration(waited)} for "
        if wait.what == "input":
            self.log(said + "its batch: the source or the decoding stands still, the devices have nothing to do")
            threads = [t for t in threading.enumerate() if t.name == "batches"]
            if not threads:
                self.log("  the thread that makes batches has ended")
        else:
            self.log(said + "the devices: they do not answer, though the batch is there; a collective may be waiting "
                     "for another process")  # fmt: skip
            threads = [t for t in threading.enumerate() if t.ident == wait.thread]
        frames = sys._current_frames()
        for thread in threads:
            if thread.ident in frames:
                self.log(f"  the thread {thread.name!r} is at:")
                for entry in traceback.format_stack(frames[thread.ident])[-FRAMES:]:
                    for line in entry.splitlines():
                        self.log(f"  {line}")

    def __enter__(self) -> "Watchdog":
        if self.seconds > 0:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout=10)
