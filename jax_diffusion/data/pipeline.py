"""A thread that has the next batches on the device in time. Which examples they are is order.py's."""

from collections.abc import Generator, Iterator
from typing import Any

import jax
import numpy as np

from jax_diffusion.data.order import Tasks
from jax_diffusion.data.placing import local_rows, place
from jax_diffusion.data.prefetch import Prefetch
from jax_diffusion.data.resident import Resident
from jax_diffusion.data.source import Source


class Batches(Prefetch):
    """Iterates over (step, batch), the batches lying on the device(s) before they are asked for.

    A batch is {"image": [B, H, W, C] uint8, "label": [B] int32 where the source has labels}; with
    steps_per_dispatch = K > 1 every leaf is [K, B, ...], the batches of K consecutive steps, and the yielded
    step is the first of them. One background thread makes them (prefetch.Prefetch). Where the set is resident on the
    devices, the thread sends the indices alone, and a batch is gathered there when it is asked for.
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
        prefetch: int = 8,  # batches made ahead at most, the one in the making included
        prefetch_bytes: int = 256 << 20,  # and no more bytes than this, those of worker processes included, but two
        stop_step: int | None = None,  # the last yield is shortened to end just before it (None: endless)
        resident: Resident | None = None,  # the same set on the devices, placed with the same sharding
    ):
        if sharding is None and jax.process_count() > 1:
            raise ValueError("Batches over several processes needs a sharding: without one they'd share nothing")
        if len(source) == 0:
            raise ValueError(f"Batches needs at least one example, {source.name} has none")
        self._resident = resident
        made = _make(source, batch_size, seed, start_step, steps_per_dispatch, sharding, stop_step, resident)
        super().__init__(made, prefetch, prefetch_bytes, elsewhere=0 if resident is not None else source.ahead)

    def __next__(self) -> tuple[int, dict[str, jax.Array]]:
        step, batch = super().__next__()
        # In the consumer's thread: programs of several processes have to be queued in one order on all of them.
        return step, batch if self._resident is None else self._resident.gather(batch)


def _make(
    source: Source,
    batch_size: int,
    seed: int,
    step: int,
    steps_per_dispatch: int,
    sharding: jax.sharding.Sharding | None,
    stop_step: int | None,
    resident: Resident | None,
) -> Generator[tuple[int, Any], None, None]:
    """Yields (step, batch on the devices), or (step, its indices there) for a resident set."""
    stacked = steps_per_dispatch > 1
    rows = None
    if jax.process_count() > 1 and resident is None:
        # Not simply the process_index-th part: on a mesh with a tensor axis two processes may share rows.
        shape = (steps_per_dispatch, batch_size) if stacked else (batch_size,)
        assert sharding is not None  # Batches has seen to it
        rows = local_rows(sharding, shape, axis=len(shape) - 1)
    tasks = Tasks(source.order, seed, batch_size, step, steps_per_dispatch, stop_step, rows)
    gathered: Iterator[Any] = iter(tasks) if resident is not None else source.batches(tasks)  # type: ignore[arg-type]  # one gather for all K steps
    for d, found in enumerate(gathered):
        step, k = tasks.steps(d)
        shape = (k, batch_size) if stacked else (batch_size,)
        if resident is not None:
            yield step, resident.place(found.astype(np.int32).reshape(shape))
            continue
        lead = (k, -1) if stacked else (-1,)
        leaves = {key: leaf.reshape(*lead, *leaf.shape[1:]) for key, leaf in found.items()}
        yield step, place(leaves, shape, sharding)
