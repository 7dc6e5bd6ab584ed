"""Work done ahead by one thread, bounded in number and in bytes."""

import collections
import contextlib
import threading
import time
import weakref
from collections.abc import Generator, Iterator
from typing import Any

import jax

LEAST = 2  # one that is ready and one that is being made: with less, nothing would be made ahead


class Prefetch:
    """Iterates over what `made` yields, which a thread calls ahead of time. What it raises is raised here.

    What lies ready and what is being made are together at most `most` items, and at most `most_bytes` of arrays, but
    never less than two items. Bytes are those on this process's devices and in its memory, and of `elsewhere` items
    that `made` may hold; the next item is taken to be as large as the last. Use as a context manager, or call close().
    """

    def __init__(self, made: Generator[Any], most: int, most_bytes: int, elsewhere: int = 0):
        self._buffer = _Buffer(max(1, most), most_bytes, elsewhere)
        self._ended = False
        self._asked, self._waited = time.perf_counter(), 0.0
        # The thread knows the buffer and not this object: one that is dropped unclosed can still be collected.
        thread = threading.Thread(target=_produce, args=(made, self._buffer), name="batches", daemon=True)
        thread.start()
        self._finalize = weakref.finalize(self, _shut, self._buffer, thread)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._ended:
            raise StopIteration
        start = time.perf_counter()
        item = self._buffer.get()
        self._waited += time.perf_counter() - start
        if isinstance(item, BaseException):
            self.close()
            raise item
        return item

    @property
    def held_bytes(self) -> int:
        """Of the items that lie ready."""
        return self._buffer.bytes

    @property
    def wait_share(self) -> float:
        """Share in [0, 1] of the time since last asked, or since the start, that __next__ spent waiting."""
        now = time.perf_counter()
        share = self._waited / max(now - self._asked, 1e-9)
        self._asked, self._waited = now, 0.0
        return min(share, 1.0)

    def close(self) -> None:
        """Stops the thread and frees what it made; iteration ends. May be called twice."""
        self._ended = True
        self._finalize()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class _Buffer:
    """What is ready, in order. One thread asks for `room`, makes an item and `put`s it; another `get`s."""

    def __init__(self, most: int, most_bytes: int, elsewhere: int):
        self.most, self.most_bytes, self.elsewhere = most, most_bytes, elsewhere
        self.items: collections.deque[tuple[Any, int]] = collections.deque()
        self.bytes = 0
        self.last = 0  # bytes of the last item made
        self.stopped = False
        self.changed = threading.Condition()

    def room(self) -> bool:
        """Waits until one more may be made; False once stopped."""

        def enough() -> bool:
            count = len(self.items) + 1
            few = count <= LEAST or self.bytes + (1 + self.elsewhere) * self.last <= self.most_bytes
            return self.stopped or (count <= self.most and few)

        with self.changed:
            self.changed.wait_for(enough)
            return not self.stopped

    def put(self, item: Any) -> None:
        size = 0 if isinstance(item, BaseException) else nbytes(item)
        with self.changed:
            if not self.stopped:
                self.items.append((item, size))
                self.bytes, self.last = self.bytes + size, size
                self.changed.notify_all()

    def get(self) -> Any:
        with self.changed:
            self.changed.wait_for(lambda: self.items or self.stopped)
            if not self.items:
                return StopIteration()
            item, size = self.items.popleft()
            self.bytes -= size
            self.changed.notify_all()
            return item

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
            self.items.clear()
            self.bytes = 0
            self.changed.notify_all()


def nbytes(tree: Any) -> int:
    """Bytes of a tree's arrays that this process holds: of a sharded one its own shards, a replica counted each."""

    def held(leaf: Any) -> int:
        if isinstance(leaf, jax.Array):
            return sum(shard.data.nbytes for shard in leaf.addressable_shards)
        return getattr(leaf, "nbytes", 0)

    return sum(map(held, jax.tree.leaves(tree)))


def _produce(made: Generator[Any], buffer: _Buffer) -> None:
    """The thread: fills the buffer until it ends, fails or is stopped; StopIteration ends the consumer too."""
    with contextlib.closing(made):  # worker processes behind it end now, not when memory is next tidied
        while buffer.room():
            try:
                item = next(made)
            except BaseException as error:
                buffer.put(error)
                return
            buffer.put(item)


def _shut(buffer: _Buffer, thread: threading.Thread) -> None:
    buffer.stop()
    if thread is not threading.current_thread():
        thread.join(timeout=10)
