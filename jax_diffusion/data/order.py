"""Which examples make up which batch: pure functions of the seed and the step.

The position in the data is a function of the training step alone: resuming needs that one integer,
whatever the number of hosts, processes, threads or steps a dispatch. Nothing here imports jax: worker processes do.
"""

import dataclasses
import functools
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple, Protocol

import numpy as np

FINEST = 10_000  # the longest period of a mixture's pattern; finer weights are rounded to it


class Order(Protocol):
    """An endless sequence of examples, every stretch of which can be had directly."""

    def indices(self, seed: int, start: int, stop: int) -> np.ndarray:
        """The examples at positions start..stop-1, int64 [stop - start]: a pure function of its arguments."""
        ...


class Shuffled(NamedTuple):
    """Epoch after epoch of the examples 0..n-1, each epoch a permutation drawn from (seed, epoch)."""

    n: int

    def indices(self, seed: int | tuple[int, ...], start: int, stop: int) -> np.ndarray:
        """See Order.indices."""
        seeds, parts = (seed,) if isinstance(seed, int) else tuple(seed), []
        while start < stop:
            epoch, at = divmod(start, self.n)
            part = _permutation(seeds, epoch, self.n)[at : at + stop - start]
            parts.append(part)
            start += len(part)
        # A copy, the cache keeps its own.
        return np.concatenate(parts).astype(np.int64, copy=False) if parts else np.empty(0, np.int64)


@functools.lru_cache(maxsize=8)  # a batch straddles two epochs, and the sources of a mixture alternate
def _permutation(seeds: tuple[int, ...], epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng((*seeds, epoch)).permutation(n)


class Mixed(NamedTuple):
    """Several sets of the given sizes, numbered one after the other, in shares proportional to `weights`.

    Which set a position belongs to is a fixed pattern that repeats after sum(weights) positions; each set goes
    through its own epochs, so that none of its examples is seen twice in one of them.
    """

    sizes: tuple[int, ...]
    weights: tuple[int, ...]  # from whole_weights

    def indices(self, seed: int, start: int, stop: int) -> np.ndarray:
        """See Order.indices."""
        part, number = self.places(start, stop)
        out, offset = np.empty(stop - start, np.int64), 0
        for j, n in enumerate(self.sizes):
            mine = part == j
            if mine.any():
                first = int(number[mine][0])  # and those that follow it without a gap
                out[mine] = offset + Shuffled(n).indices((seed, j), first, first + int(mine.sum()))
            offset += n
        return out

    def places(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """For positions start..stop-1, [M] each: the set, and how many of that set came before."""
        pattern, before = _pattern(self.weights)
        cycle, at = np.divmod(np.arange(start, stop, dtype=np.int64), len(pattern))
        part = pattern[at]
        return part, cycle * np.asarray(self.weights, np.int64)[part] + before[at]

    def once(self) -> np.ndarray:
        """Examples in the mixture's shares, always the same and none twice, until the first set runs out: int64 [M]."""
        period = sum(self.weights)
        # The set that runs out first does so in the cycle after the last that it can fill.
        cycles = min(n // w for n, w in zip(self.sizes, self.weights, strict=True)) + 1
        part, number = self.places(0, cycles * period)
        sizes = np.asarray(self.sizes)
        short = np.flatnonzero(number >= sizes[part])
        end = short[0] if len(short) else len(part)
        return (np.cumsum(sizes) - sizes)[part[:end]] + number[:end]


def whole_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """Positive weights as the smallest whole numbers in the same proportion, or to 1/10,000 of their sum."""
    exact = [Fraction(str(w)) for w in weights]
    scale = np.lcm.reduce([f.denominator for f in exact], dtype=object)
    whole = [int(f * scale) for f in exact]
    common = int(np.gcd.reduce(whole, dtype=object))
    whole = [w // common for w in whole]
    total = sum(whole)
    return tuple(whole if total <= FINEST else (max(1, round(FINEST * w / total)) for w in whole))


@functools.lru_cache(maxsize=8)
def _pattern(weights: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """One period of a mixture, [sum(weights)] each: the set at each position, and how many of it came before.

    After any number of positions each set is less than one example off its share: the rule of R. Tijdeman, "The
    chairman assignment problem" (1980), in whole numbers. At the end of the period all are exact, so it repeats.
    """
    k, period = len(weights), sum(weights)
    slack = max(2 * k - 2, 1)
    pattern, before, counts = np.zeros(period, np.int64), np.zeros(period, np.int64), [0] * k
    for p in range(period):
        due = [(j, slack * ((p + 1) * w - period * counts[j])) for j, w in enumerate(weights)]
        # Of those that are behind, the one whose time is up first.
        behind = [(Fraction((slack - 1) * period - x, weights[j]), j) for j, x in due if x >= period or k == 1]
        j = min(behind)[1]
        pattern[p], before[p] = j, counts[j]
        counts[j] += 1
    return pattern, before


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
    return Shuffled(n).indices(seed, step * batch_size, (step + 1) * batch_size)


@dataclasses.dataclass(frozen=True)
class Tasks:
    """The gathers of a run, one a dispatch: `tasks[d]` is the flat int64 [k * b] of what to gather for it.

    b: the rows of the batch that this process reads; k: steps_per_dispatch, fewer in the last task.
    """

    order: Order
    seed: int
    batch_size: int  # B, over all devices and processes
    start_step: int
    steps_per_dispatch: int = 1  # K
    stop_step: int | None = None  # None: endless
    rows: np.ndarray | None = None  # which of the B this process reads, all of them by default

    def __len__(self) -> int:
        if self.stop_step is None:
            return 1 << 60
        return max(0, -(-(self.stop_step - self.start_step) // self.steps_per_dispatch))

    def steps(self, d: int) -> tuple[int, int]:
        """(first step, number of steps) of dispatch d."""
        step = self.start_step + d * self.steps_per_dispatch
        k = self.steps_per_dispatch
        return step, k if self.stop_step is None else min(k, self.stop_step - step)

    def __getitem__(self, d: int) -> np.ndarray:
        if not 0 <= d < len(self):
            raise IndexError(d)
        step, k = self.steps(d)
        all_rows = self.order.indices(self.seed, step * self.batch_size, (step + k) * self.batch_size)
        return (all_rows.reshape(k, -1) if self.rows is None else all_rows.reshape(k, -1)[:, self.rows]).reshape(-1)
