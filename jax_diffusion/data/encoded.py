"""Sets of encoded images: decoded once into memory where they fit, else batch by batch, in threads or processes."""

import functools
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import numpy as np

from jax_diffusion.data import workers
from jax_diffusion.data.images import Format
from jax_diffusion.data.order import Order, Shuffled
from jax_diffusion.data.reader import Encoded, Reader
from jax_diffusion.data.source import ArraySource, Source
from jax_diffusion.errors import printable
from jax_diffusion.progress import Progress

log = logging.getLogger("jax_diffusion.data")
CHUNK = 64  # images a task: enough that the pool's own Python is small beside the decoding


def cores() -> int:
    """The cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # absent on macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def open_encoded(
    items: Encoded,
    cfg: Any,  # the data config: what every image becomes, max_bytes, workers
    *,
    name: str,
    class_names: Sequence[str] = (),  # () : no labels
) -> Source:
    """Makes a source of encoded images, in memory if the decoded set has at most max_bytes.

    Raises:
      UserError: not one image is readable, or they differ in size or colour and none was asked for.
    """
    processes = workers.checked(cfg)
    reader = Reader(items, Format.from_config(cfg), name, len(class_names))
    if len(items) * math.prod(reader.shape or ()) > cfg.max_bytes:
        return LazySource(reader, name=name, class_names=class_names, processes=processes)
    images, labels = _decode_all(reader, len(items), name)
    skipped = reader.skipped
    if skipped:
        shown = ", ".join(skipped[:5]) + (", ..." if len(skipped) > 5 else "")
        log.warning("%s: skipped %d corrupt of %d images: %s", name, len(skipped), len(items), printable(shown))
    return ArraySource(images, labels if class_names else None, name=name, class_names=class_names, skipped=skipped)


def _decode_all(read: Reader, n: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """All readable images, in order, as one array: uint8 [M, H, W, C] and int32 [M] (-1: no label)."""
    images, labels = read.empty(n)
    good = np.zeros(n, bool)

    def task(start: int) -> int:
        stop = min(start + CHUNK, n)
        for i in range(start, stop):
            found = read(i)
            if found:
                images[i], label = found
                labels[i] = -1 if label is None else label
                good[i] = True
        return stop - start

    threads = 1 if read.tiny else cores()
    _run(task, range(0, n, CHUNK), threads, Progress(f"decoding {name}", n))
    if good.all():
        return images, labels
    kept = np.flatnonzero(good)
    # Row by row in place: a masked copy would need the set's memory twice.
    for to, i in enumerate(kept):
        if to != i:
            images[to] = images[i]
    return images[: len(kept)], labels[kept]


def _run(task: Callable[[int], int], starts: Sequence[int], threads: int, progress: Progress) -> None:
    with ThreadPoolExecutor(threads, "decode") as pool:
        futures = [pool.submit(task, start) for start in starts]
        try:
            for future in as_completed(futures):
                progress.add(future.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)  # an error, or Ctrl-C, need not wait for the rest
            raise


class LazySource:
    """A set too large for memory: each batch is read and decoded, in a thread pool or by worker processes.

    A corrupt image is replaced by the next readable one, with that one's label: always the same one,
    so that a batch stays a pure function of its indices. It is named in `skipped` once met.
    """

    def __init__(self, reader: Reader, *, name: str, class_names: Sequence[str] = (), processes: int = 0):
        self.name = name
        assert reader.shape is not None  # it has read one image
        self.shape: tuple[int, ...] = reader.shape
        self.class_names = tuple(class_names)
        self.num_classes = len(class_names) or None
        self.processes = processes
        self.ahead = processes * workers.HELD
        self.reader = reader
        self._warned: set[int] = set()

    @property
    def skipped(self) -> tuple[str, ...]:
        return self.reader.skipped

    @property
    def order(self) -> Order:
        """See Source.order."""
        return Shuffled(len(self))

    def __len__(self) -> int:
        return len(self.reader)

    def batches(self, tasks: Sequence[np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        """See Source.batches."""
        if not self.processes:
            return map(self.batch, tasks)
        return workers.stream(self.reader, tasks, self.processes, self._warn)

    @functools.cached_property
    def _pool(self) -> ThreadPoolExecutor:
        self._threads = min(32, 4 + cores())  # a few wait for the disk
        return ThreadPoolExecutor(self._threads, "decode")

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """See Source.batch."""
        indices = np.asarray(indices)
        images, labels = self.reader.empty(len(indices))
        sorted_ = np.argsort(indices, kind="stable")  # as they lie on the disk
        pool = self._pool
        per_task = max(1, min(16, len(indices) // self._threads))

        def task(start: int) -> None:
            for j in sorted_[start : start + per_task]:
                images[j], label = self.reader.readable(int(indices[j]))
                labels[j] = -1 if label is None else label

        list(pool.map(task, range(0, len(indices), per_task)))
        self._warn()
        return self.reader.named(images, labels)

    def _warn(self) -> None:
        """Names the corrupt images that were met since the last time."""
        if len(self._warned) == len(self.reader.bad):
            return
        with self.reader.lock:
            new = {i: name for i, name in self.reader.bad.items() if i not in self._warned}
            self._warned |= new.keys()
        for _, name in sorted(new.items()):
            log.warning("%s: skipped corrupt image %s", self.name, printable(name))
