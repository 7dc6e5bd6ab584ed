"""Which examples make up which batch, and a thread that has the next batches on the device in time.

The position in the data is a function of the training step alone: resuming needs that one integer,
whatever the number of hosts, threads or steps a dispatch.
"""

import functools
import queue
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jax_diffusion.data.source import Source


@functools.lru_cache(maxsize=4)  # a batch straddles two epochs, and train and eval may alternate
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n)


def batch_indices(seed: int, step: int, batch_size: int, n: int) -> np.ndarray:
    """Indices, int64 [B], of the examples of one step: a pure function of its arguments.

    Example j of the batch is number p = step * B + j of an endless sequence of epochs, each a
    permutation of 0..n-1 drawn from (seed, p // n). A batch may straddle epochs, or be longer than one.

    Args:
      seed: of the order, >= 0.
      step: of the training, >= 0.
      batch_size: B, over all devices and processes.
      n: number of examples, >= 1.
    """
    if n < 1 or batch_size < 1 or step < 0:
        raise ValueError(f"batch_indices needs n, batch_size >= 1 and step >= 0, got {n=}, {batch_size=}, {step=}")
    position = step * batch_size
    end = position + batch_size
    parts = []
    while position < end:
        epoch, start = divmod(position, n)
        stop = min(n, start + end - position)
        parts.append(_permutation(seed, epoch, n)[start:stop])
        position += stop - start
    return np.concatenate(parts).astype(np.int64, copy=False)  # a copy, the cache keeps its own


def local_rows(sharding: jax.sharding.Sharding, shape: tuple[int, ...], axis: int) -> np.ndarray:
    """Rows of `axis` of a global array of `shape` on this process's devices, ascending and once each."""
    slices = {s[axis].indices(shape[axis]) for s in sharding.addressable_devices_indices_map(shape).values()}
    return np.unique(np.concatenate([np.arange(*s) for s in slices]))


class Batches:
    """Iterates over (step, batch), the batches lying on the device(s) before they are asked for.

    A batch is {"image": [B, H, W, C] uint8, "label": [B] int32 where the source has labels}; with
    steps_per_dispatch = K > 1 every leaf is [K, B, ...], the batches of K consecutive steps, and the yielded
    step is the first of them. One background thread makes them; what it raises is raised here.
    Use as a context manager, or call close().
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,  # B, over all devices and processes
        seed: int,  # of the order of the examples
        start_step: int,  # first step to yield: the number of steps already trained
        *,
        steps_per_dispatch: int = 1,  # K
        sharding: jax.sharding.Sharding | None = None,  # of a leaf as yielded: its B axis is 0, or 1 if K > 1
        prefetch: int = 2,  # batches made ahead, each of which takes device memory
        stop_step: int | None = None,  # the last yield is shortened to end just before it (None: endless)
    ):
        if sharding is None and jax.process_count() > 1:
            raise ValueError("Batches over several processes needs a sharding: without one they'd share nothing")
        if len(source) == 0:
            raise ValueError(f"Batches needs at least one example, {source.name} has none")
        self._queue: queue.Queue = queue.Queue(maxsize=max(1, prefetch))
        self._stop = threading.Event()
        self._ended = False
        self._asked, self._waited = time.perf_counter(), 0.0
        made = _make(source, batch_size, seed, start_step, steps_per_dispatch, sharding, stop_step)
        # The thread knows the queue and not the object: one that is dropped unclosed can still be collected.
        args = (made, self._queue, self._stop)
        self._thread = threading.Thread(target=_produce, args=args, name="batches", daemon=True)
        self._thread.start()
        self._finalize = weakref.finalize(self, _shut, self._queue, self._stop, self._thread)

    def __iter__(self) -> Iterator[tuple[int, dict[str, jax.Array]]]:
        return self

    def __next__(self) -> tuple[int, dict[str, jax.Array]]:
        if self._ended:
            raise StopIteration
        start = time.perf_counter()
        item = self._queue.get()
        self._waited += time.perf_counter() - start
        if isinstance(item, BaseException):
            self.close()
            raise item
        return item

    @property
    def wait_share(self) -> float:
        """Share in [0, 1] of the time since last asked, or since the start, that __next__ spent waiting."""
        now = time.perf_counter()
        share = self._waited / max(now - self._asked, 1e-9)
        self._asked, self._waited = now, 0.0
        return min(share, 1.0)

    def close(self) -> None:
        """Stops the thread and frees the batches it made; iteration ends. May be called twice."""
        self._ended = True
        self._finalize()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _make(
    source: Source,
    batch_size: int,
    seed: int,
    step: int,
    steps_per_dispatch: int,
    sharding: jax.sharding.Sharding | None,
    stop_step: int | None,
) -> Iterator[tuple[int, dict[str, jax.Array]]]:
    """Yields (step, batch on the devices)."""
    n = len(source)
    stacked = steps_per_dispatch > 1
    while stop_step is None or step < stop_step:
        k = steps_per_dispatch if stop_step is None else min(steps_per_dispatch, stop_step - step)
        shape = (k, batch_size) if stacked else (batch_size,)
        rows = slice(None)
        if jax.process_count() > 1:
            # Not simply the process_index-th part: on a mesh with a tensor axis two processes may share rows.
            rows = local_rows(sharding, shape, axis=len(shape) - 1)
        indices = np.stack([batch_indices(seed, step + i, batch_size, n)[rows] for i in range(k)])
        flat = source.batch(indices.reshape(-1))  # one gather for all K steps
        lead = indices.shape if stacked else indices.shape[1:]
        yield (
            step,
            {key: _place(leaf.reshape(*lead, *leaf.shape[1:]), shape, sharding) for key, leaf in flat.items()},
        )
        step += k


def _place(leaf: np.ndarray, lead: tuple[int, ...], sharding: jax.sharding.Sharding | None) -> jax.Array:
    """Puts this process's part of a leaf on its devices; `lead` is the global [B] or [K, B]."""
    shape = (*lead, *leaf.shape[len(lead) :])
    if sharding is not None and len(lead) == 2 and sharding.shard_shape(shape)[0] != lead[0]:
        raise ValueError(f"the steps axis of a [K, B, ...] batch cannot be sharded, but {sharding} does")
    if jax.process_count() > 1:
        return jax.make_array_from_process_local_data(sharding, leaf, shape)
    return jax.device_put(leaf, sharding)


def _produce(made: Iterator[Any], out: queue.Queue, stop: threading.Event) -> None:
    """The thread: fills the queue until it ends, fails or is stopped; StopIteration ends the consumer too."""
    item: Any = None
    while not stop.is_set() and not isinstance(item, BaseException):
        try:
            item = next(made)
        except BaseException as error:
            item = error
        while not stop.is_set():
            try:
                out.put(item, timeout=0.1)
                break
            except queue.Full:
                continue


def _shut(out: queue.Queue, stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    while True:  # room for a thread that is about to put, and the device memory freed
        try:
            out.get_nowait()
        except queue.Empty:
            break
    if thread is not threading.current_thread():
        thread.join(timeout=10)
