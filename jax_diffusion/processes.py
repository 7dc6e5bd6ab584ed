"""When another process of a run is gone: one line and exit status RESUME, instead of a hang or a crash.

Collectives of CPUs (gloo) break at once when a peer dies; those of GPUs and TPUs wait for ever. There JAX's
coordination service notices missing heartbeats and aborts the process from a thread of its own, which Python never
hears of but through SIGABRT.
"""

import contextlib
import ctypes
import os
import pathlib
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from jax_diffusion.errors import UserError

RESUME = 75  # EX_TEMPFAIL: start all processes again, and the run goes on

# How gloo, NCCL and the coordination service say that they have lost another process.
_LOST = re.compile(
    r"gloo .*failed|gloo context|connection (reset|closed|refused)|socket closed|broken pipe|heartbeat|coordination "
    r"serv|another task (died|failed)|nccl (operation|communicator).*abort|remote process exited|barrier .*timed out",
    re.IGNORECASE | re.DOTALL,
)


def several() -> bool:
    """Whether this process has joined others. Starts no backend."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized() and _rank()[1] > 1


def _rank() -> tuple[int, int]:
    from jax._src import distributed

    return distributed.global_state.process_id, distributed.global_state.num_processes


def is_loss(error: BaseException) -> bool:
    """Whether an error of a collective, or of a checkpoint's barrier, says that another process is gone."""
    ours = isinstance(error, OSError | UserError) or not isinstance(error, Exception)  # a pipe of our own, say
    return several() and not ours and _LOST.search(str(error)) is not None


def describe(why: str, workdir: str | os.PathLike | None) -> str:
    """ "process 1 of 2 is gone (...); start all again: training resumes at step 200"."""
    index, number = _rank()
    named = re.search(r"task[:/ ](\d+)", why)
    who = f"process {1 - index}" if number == 2 else f"process {named[1]}" if named else "another process"
    reason = next((line.strip() for line in why.splitlines() if line.strip()), "")
    reason = re.sub(r"^[A-Z_]+: |\[external/[^]]*\] ?", "", reason)[:200]
    line = f"{who} of {number} is gone" + (f" ({reason})" if reason else "") + "; start all of them again"
    if workdir is None:
        return line
    steps = [int(p.name) for p in (pathlib.Path(workdir) / "checkpoints").glob("*") if p.name.isdigit()]
    return f"{line}: training resumes at step {max(steps):,}" if steps else f"{line}: no step was saved yet"


_once = threading.Lock()


def leave(why: str, workdir: str | os.PathLike | None) -> None:
    """Says that another process is gone and ends this one with RESUME. Does not return.

    Nothing is tidied up: what would be waits for the other process too. All that is on disk is whole at any time.
    """
    if not _once.acquire(blocking=False):  # a second thread finds out too: the first is about to end both
        threading.Event().wait()
    sys.stdout.flush()
    # With its end in one piece: print writes that apart under PYTHONUNBUFFERED, and native threads are complaining too.
    sys.stderr.write(f"jax-diffusion: error: {describe(why, workdir)}\n")
    sys.stderr.flush()
    os._exit(RESUME)


def _is_alone() -> bool:
    """Whether the coordination service has failed: its client, asked for a key, answers nothing or an error."""
    from jax._src import distributed

    answers = []

    def ask():
        try:
            client: Any = distributed.global_state.client
            client.key_value_try_get("jax_diffusion/none")
        except Exception as e:
            answers.append(str(e))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(3)  # where the abort comes from the client itself, it never answers
    return not (answers and "NOT_FOUND" in answers[0])


@contextlib.contextmanager
def aborting(then: Callable[[], None]) -> Iterator[None]:
    """Within it `then()` is called where native code aborts this process, on whatever thread; for it to end the process
    its own way. Python's own signal handlers run on the main thread, which may be waiting in native code."""
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: then())
    libc = ctypes.CDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    before = libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        libc.signal(signal.SIGABRT, before)


@contextlib.contextmanager
def watched(workdir: str | os.PathLike | None = None) -> Iterator[None]:
    """Within it the loss of another process ends this one (`leave`). workdir: of the run that will be resumed."""
    if not several():
        yield
        return

    def aborted():
        if _is_alone():
            leave("JAX's distributed service ended this one", workdir)

    with aborting(aborted):
        try:
            yield
        except BaseException as e:
            if is_loss(e):
                leave(str(e), workdir)
            raise
