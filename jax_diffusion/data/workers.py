"""Batches decoded by worker processes: one task is one whole batch, and no batch depends on who made it.

A worker per task number modulo N, by grain; resuming is by the step and not by grain's state, so that N may change.
"""

import importlib.util
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jax_diffusion.data.reader import Reader
from jax_diffusion.errors import UserError

# Batches travel through pipes. Shared memory, grain's default, costs as much of the processor (measured), is 64 MiB in
# many a container, where who exceeds it dies of SIGBUS, and its last blocks are left to the end of the process.
NO_SHARED_MEMORY = 1 << 62

HELD = 4  # batches of a worker: in the making, made, in its pipe, and received


def checked(cfg: Any) -> int:
    """config.data.workers; UserError where it is no number of processes, or nothing runs them."""
    n = getattr(cfg, "workers", 0)
    if n < 0:
        raise UserError(f"config.data.workers={n} is no number of processes: 0 decodes in threads of this one")
    if n and importlib.util.find_spec("grain") is None:
        raise UserError(f"config.data.workers={n} needs grain: pip install grain, or set --config.data.workers=0")
    return n


def stream(
    reader: Reader, tasks: Sequence[np.ndarray], workers: int, learned: Callable[[], None]
) -> Iterator[dict[str, np.ndarray]]:
    """Yields reader.gather(task) for each task in turn; the processes end when the iterator is closed or dropped.

    learned: called when `reader` was told of images that a worker found to be corrupt.

    Raises:
      UserError: what a worker raised, or that one ended (killed for its memory, say).
    """
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain asks for flags of its own, which no command of ours has
    dataset = grain.MapDataset.source(_Batches(reader, tasks))
    # Its own threads would make hundreds of batches ahead.
    dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    options = grain.experimental.DatasetOptions(min_shm_size=NO_SHARED_MEMORY)
    dataset = grain.experimental.WithOptionsIterDataset(dataset, options)
    processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
    batches = iter(dataset.mp_prefetch(processes, worker_init_fn=_begin))
    try:
        while True:
            try:
                found = next(batches)
            except StopIteration:
                return
            except UserError as error:
                # As it was raised: grain appends a note on its tracebacks, below a line.
                raise UserError(str(error).split("\n")[0]) from error
            except RuntimeError as error:
                if "terminated unexpectedly" not in str(error):
                    raise
                raise UserError(
                    f"config.data.workers={workers}: a worker process ended ({error}); if it was killed for memory, "
                    "use fewer; a script that trains needs its code below if __name__ == '__main__'"
                ) from error
            news = [reader.mark(int(i)) for i in found.pop("bad")]
            if any(news):
                learned()
            yield found
    finally:
        batches.close()


class _Batches:
    """The tasks' batches by number, in a worker; with each the numbers of the images newly found corrupt."""

    def __init__(self, reader: Reader, tasks: Sequence[np.ndarray]):
        self.reader, self.tasks = reader, tasks
        self.told = len(reader.bad)

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, d: int) -> dict[str, np.ndarray]:
        batch = self.reader.gather(self.tasks[d])
        new = list(self.reader.bad)[self.told :] if len(self.reader.bad) > self.told else []
        self.told += len(new)
        return batch | {"bad": np.asarray(new, np.int64)}


def _begin(index: int, count: int) -> None:
    """In a worker, before its first batch."""
    # Ctrl-C and preemption are the trainer's business: it may still want batches, and ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Nothing here touches a device; should something ever do, not the accelerator that the trainer holds.
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_platforms", "cpu")
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # it was killed: nobody will ask for the next batch, nor for this one
