"""Sampling that can be watched: some rows of a solver's table at a time, by one compiled program.

Model.sample is one call, within which nothing is seen. A Stream runs the same rows on the same state, some a call, and
shows the denoised prediction after each. Which rows and how many a call runs is data: neither that nor another number
of steps compiles anything (tables are filled up with rows that are never run).
"""

import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_diffusion import generating, placement, sharding
from jax_diffusion.errors import UserError
from jax_diffusion.model import Model
from jax_diffusion.solvers import Table

LEAST_ROOM = 64  # rows of the smallest program
MOST_AT_ONCE = 64


class Moment(NamedTuple):
    """How far sampling is."""

    done: int  # rows, network evaluations
    rows: int
    images: np.ndarray  # [num, *shape] the denoised prediction; at the end the samples


def room(rows: int) -> int:
    """Rows of the program that runs a table of so many: the next power of two, LEAST_ROOM at least."""
    return max(LEAST_ROOM, 1 << (rows - 1).bit_length())


class Stream:
    """Draws the samples of a model, showing them on the way. Several threads may draw at a time: they take turns."""

    def __init__(self, model: Model):
        self.model = model
        self._begin, self._advance = generating.make_portions(model.network, model.process)
        self._turn = threading.Lock()

    def __call__(
        self,
        key: jax.Array,
        table: Table,
        num: int = 1,
        *,
        labels: Any = None,
        known: Any = None,
        mask: Any = None,
        guidance: Any = 1.0,
        batch_size: int = 64,
        pace: float = 0.1,
    ) -> Iterator[Moment]:
        """Yields Moments, the last with the samples that model.sample draws given the same arguments.

        pace: about how many seconds apart. Raises UserError for solvers that are no tables.
        """
        model = self.model
        if not isinstance(table, Table):
            raise UserError(f"solver {table.name!r} is no table of rows: it cannot be watched; use model.sample")
        samples, shared = model.request(num, labels, None, guidance)
        start = model.start(None, known, mask, num)
        clip = model.config.sampling.clip
        filled = table.filled(room(len(table)))
        parts, mesh = [], sharding.make_mesh()
        for indices, (rows, begin) in model.batches(num, batch_size, mesh, (samples, start)):
            parts.append([self._begin(key, filled, indices, begin, shape=model.shape), indices, rows, begin])
        done, count = 0, 1
        while done < len(table):
            count = min(count, len(table) - done)
            with self._turn:
                began = time.perf_counter()
                shown = []
                for part in parts:
                    carry, indices, rows, begin = part
                    with placement.tracing_for(mesh):
                        part[0], x0_hat = self._advance(
                            model.params, key, filled, indices, rows, shared, begin, carry, np.int32(count), clip=clip
                        )
                    shown.append(x0_hat)
                jax.block_until_ready(shown)
                took = time.perf_counter() - began
            done += count
            # A first call that compiles is slow; then more rows a call, by and by.
            count = int(np.clip(pace * count / max(took, 1e-6), 1, min(2 * count, MOST_AT_ONCE)))
            if done == len(table):
                shown = [part[0][0] for part in parts]
            images = np.concatenate([generating.gather(x) for x in shown])[:num]
            if done == len(table) and "known" in start:
                images = np.where(start["mask"], start["known"], images)
            yield Moment(done, len(table), images)
