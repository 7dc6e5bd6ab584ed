"""Sets of encoded images: decoded once into memory where they fit, else batch by batch in threads."""

import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Protocol

import numpy as np

from jax_diffusion.data.images import Format, decode
from jax_diffusion.data.source import ArraySource, Source
from jax_diffusion.errors import UserError
from jax_diffusion.progress import Progress

log = logging.getLogger("jax_diffusion.data")
TINY = 1024  # bytes of a file below which decoding is all Python: one thread does 13,500/s, two 12,200/s
CHUNK = 64  # images a task: enough that the pool's own Python is small beside the decoding


class Encoded(Protocol):
    """Encoded images 0..len-1; `read` may be called from many threads."""

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """What to call image i when it is corrupt."""
        ...

    def read(self, i: int) -> tuple[bytes, int | None]:
        """The file's bytes and its label."""
        ...


class Subset:
    """Some of the images of another Encoded."""

    def __init__(self, items: Encoded, indices: np.ndarray):
        self.items, self.indices = items, indices

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, i: int) -> str:
        return self.items.name(int(self.indices[i]))

    def read(self, i: int) -> tuple[bytes, int | None]:
        return self.items.read(int(self.indices[i]))


def cores() -> int:
    """The cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # absent on macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def open_encoded(
    items: Encoded,
    fmt: Format,
    max_bytes: int,
    *,
    name: str,
    class_names: Sequence[str] = (),  # () : no labels
) -> Source:
    """Makes a source of encoded images, in memory if the decoded set has at most max_bytes.

    Raises:
      UserError: not one image is readable, or they differ in size or colour and none was asked for.
    """
    reader = _Reader(items, fmt, name)
    if len(items) * np.prod(reader.shape) > max_bytes:
        return LazySource(reader, name=name, class_names=class_names)
    images, labels = _decode_all(reader, len(items), name)
    skipped = reader.skipped
    if skipped:
        shown = ", ".join(skipped[:5]) + (", ..." if len(skipped) > 5 else "")
        log.warning("%s: skipped %d corrupt of %d images: %s", name, len(skipped), len(items), shown)
    return ArraySource(images, labels if class_names else None, name=name, class_names=class_names, skipped=skipped)


class _Reader:
    """Reads and decodes one image; remembers which were corrupt. `shape` is that of the first readable."""

    def __init__(self, items: Encoded, fmt: Format, name: str):
        self.items = items
        self.fmt = fmt
        self.source_name = name
        self.bad: dict[int, str] = {}
        self.lock = threading.Lock()
        self.shape: tuple[int, ...] | None = None
        for i in range(len(items)):
            found = self(i)
            if found:
                self.tiny = len(items.read(i)[0]) < TINY
                self.shape = found[0].shape
                self.first = items.name(i)
                if self.shape[2] == 3:
                    # As found, but grey among colour becomes colour; colour among grey is refused, see below.
                    self.fmt = fmt._replace(channels=3)
                return
        raise UserError(
            f"config.data.path: none of the {len(items)} images in {name} can be decoded (the first is {items.name(0)})"
        )

    @property
    def skipped(self) -> tuple[str, ...]:
        with self.lock:
            return tuple(name for _, name in sorted(self.bad.items()))

    def __call__(self, i: int) -> tuple[np.ndarray, int | None] | None:
        """Image i as (uint8 [H, W, C], label), or None where it is corrupt."""
        if i in self.bad:
            return None
        try:
            data, label = self.items.read(i)
            image = decode(data, self.fmt)
        except UserError:
            raise
        except Exception:  # Pillow raises a dozen types on damaged files; each means the same here.
            with self.lock:
                self.bad[i] = self.items.name(i)
            return None
        if self.shape is not None and image.shape != self.shape:
            self._refuse(i, image.shape)
        return image, label

    def _refuse(self, i: int, shape: tuple[int, ...]) -> None:
        a, b = f"{self.first} is {_describe(self.shape)}", f"{self.items.name(i)} is {_describe(shape)}"
        if shape[:2] != self.shape[:2]:
            raise UserError(
                f"config.data.size=() keeps the images' own size, but in {self.source_name} sizes differ: "
                f"{a}, {b}; set --config.data.size=64,64"
            )
        raise UserError(
            f"config.data.channels=0 keeps the channels as found, but {self.source_name} has both: {a}, {b}; "
            "set --config.data.channels=3 or 1"
        )


def _describe(shape: tuple[int, ...]) -> str:
    return f"{shape[0]}x{shape[1]} {'grey' if shape[2] == 1 else 'colour'}"


def _decode_all(read: _Reader, n: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """All readable images, in order, as one array: uint8 [M, H, W, C] and int32 [M] (-1: no label)."""
    images = np.empty((n, *read.shape), np.uint8)
    labels = np.full(n, -1, np.int32)
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
    """A set too large for memory: each batch is read and decoded in a thread pool.

    A corrupt image is replaced by the next readable one, with that one's label: always the same one,
    so that a batch stays a pure function of its indices. It is named in `skipped` once met.
    """

    def __init__(self, read: _Reader, *, name: str, class_names: Sequence[str] = ()):
        self.name = name
        self.shape = read.shape
        self.class_names = tuple(class_names)
        self.num_classes = len(class_names) or None
        self._read = read
        self._threads = min(32, 4 + cores())  # a few wait for the disk
        self._pool = ThreadPoolExecutor(self._threads, "decode")

    @property
    def skipped(self) -> tuple[str, ...]:
        return self._read.skipped

    def __len__(self) -> int:
        return len(self._read.items)

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """See Source.batch."""
        indices = np.asarray(indices)
        images = np.empty((len(indices), *self.shape), np.uint8)
        labels = np.full(len(indices), -1, np.int32)
        per_task = max(1, min(16, len(indices) // self._threads))

        def task(start: int) -> None:
            for j in range(start, min(start + per_task, len(indices))):
                images[j], label = self._readable(int(indices[j]))
                labels[j] = -1 if label is None else label

        list(self._pool.map(task, range(0, len(indices), per_task)))
        return {"image": images} | ({"label": labels} if self.num_classes else {})

    def _readable(self, i: int) -> tuple[np.ndarray, int | None]:
        n = len(self)
        if not -n <= i < n:
            raise IndexError(f"image {i} of {n} in {self.name}")
        for k in range(n):
            j = (i + k) % n
            known = j in self._read.bad
            found = self._read(j)
            if found:
                return found
            if not known:
                log.warning("%s: skipped corrupt image %s", self.name, self._read.items.name(j))
        raise UserError(f"config.data.path: no image in {self.name} can be decoded any more")
