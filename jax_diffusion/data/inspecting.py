"""A look at a data set: counts, statistics, corrupt files, what the network will see, and how fast it comes."""

import contextlib
import time
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_diffusion import conditions, io, sharding
from jax_diffusion import config as configs
from jax_diffusion.data import augment, resident
from jax_diffusion.data.order import Tasks
from jax_diffusion.data.pipeline import Batches
from jax_diffusion.data.source import ArraySource, Source
from jax_diffusion.progress import Progress

CHUNK = 256  # examples read at a time
SAMPLE = 10_000  # examples that statistics are taken of, where reading all would take long


class Survey(NamedTuple):
    """What was found in `indices` of a set; statistics are of values as the network sees them, uint8 in [-1, 1]."""

    indices: np.ndarray  # ascending
    labels: np.ndarray | None  # int32, of those
    mean: np.ndarray  # [C]
    std: np.ndarray
    least: np.ndarray
    most: np.ndarray
    dtype: np.dtype


def survey(source: Source, sample: int | None = None) -> Survey:
    """Reads `sample` examples evenly spread over the set (0: all; None: all that lie in memory, else 10,000)."""
    n = len(source)
    if sample is None:
        sample = 0 if isinstance(source, ArraySource) and type(source.images) is np.ndarray else SAMPLE
    indices = np.arange(n) if not sample or sample >= n else np.unique(np.linspace(0, n - 1, sample).astype(np.int64))
    progress, labels = Progress(f"reading {source.name}", len(indices)), []
    moments: Any = None
    for start in range(0, len(indices), CHUNK):
        batch = source.batch(indices[start : start + CHUNK])
        values = batch["image"].reshape(-1, batch["image"].shape[-1])
        moments = (moments or _Moments(values)).add(values)
        labels += [batch["label"]] if "label" in batch else []
        progress.add(len(batch["image"]))
    known = np.concatenate(labels) if labels else None
    mean, std, least, most = moments.result()
    return Survey(indices, known, mean, std, least, most, batch["image"].dtype)


class _Moments:
    """Mean, deviation and extremes of channels [N, C], exact for uint8: of these it counts the 256 values."""

    def __init__(self, values: np.ndarray):
        channels = values.shape[1]
        self.bytes = values.dtype == np.uint8
        self.counts = np.zeros((channels, 256), np.int64)
        self.n, self.sums = 0, np.zeros((2, channels))
        self.least, self.most = np.full(channels, np.inf), np.full(channels, -np.inf)

    def add(self, values: np.ndarray) -> "_Moments":
        self.n += len(values)
        if self.bytes:
            for c, channel in enumerate(values.T):
                self.counts[c] += np.bincount(channel, minlength=256)
            return self
        wide = values.astype(np.float64)
        self.sums += wide.sum(0), np.square(wide).sum(0)
        self.least, self.most = np.minimum(self.least, wide.min(0)), np.maximum(self.most, wide.max(0))
        return self

    def result(self) -> tuple[np.ndarray, ...]:
        if self.bytes:
            grey = np.arange(256) / 127.5 - 1
            mean = self.counts @ grey / self.n
            std = np.sqrt([c @ np.square(grey - m) / self.n for c, m in zip(self.counts, mean, strict=True)])
            least, most = zip(*(grey[np.flatnonzero(c)[[0, -1]]] for c in self.counts), strict=True)
            return mean, std, np.array(least), np.array(most)
        mean, square = self.sums / self.n
        return mean, np.sqrt(np.maximum(square - mean**2, 0)), self.least, self.most


def where(source: Source) -> str:
    """In what form the set lies where."""
    size = len(source) * int(np.prod(source.shape))
    if isinstance(source, ArraySource):
        size *= source.images.dtype.itemsize
        mapped = type(source.images) is not np.ndarray
        return f"{size / 2**20:,.1f} MiB " + ("memory-mapped from disk" if mapped else "in the host's memory")
    return f"decoded batch by batch from disk ({size / 2**20:,.1f} MiB decoded, above config.data.max_bytes)"


def chosen(source: Source, found: Survey, seed: int, num: int) -> tuple[np.ndarray, int | None]:
    """(indices, columns) of a grid: examples in the order of training, a row for each class where that reads well."""
    order = np.random.default_rng(seed).permutation(len(found.indices))
    classes = source.num_classes or 0
    if found.labels is None or not 1 < classes <= 20:
        return found.indices[order[:num]], None
    columns = max(1, num // classes)
    rows = [order[found.labels[order] == c][:columns] for c in range(classes)]
    # A class with fewer repeats its own, so that a row stays a class.
    rows = [np.resize(row, columns) for row in rows if len(row)]
    return found.indices[np.concatenate(rows)], columns


def grid(config: configs.ConfigDict, source: Source, split: str, found: Survey, num: int) -> np.ndarray:
    """A picture of what the network will see: scaled, in training flipped, with its condition image on the left."""
    indices, columns = chosen(source, found, config.seed, num)
    x0 = augment.to_float(jax.numpy.asarray(source.batch(indices)["image"]))
    if config.data.flip and split == "train" and x0.ndim == 4:
        x0 = augment.random_flip(jax.random.key(config.seed), x0)
    condition = conditions.make(config.condition.name, source.shape, **configs.options(config.condition))
    if condition is None:
        return io.grid(np.asarray(x0), columns=columns)
    return io.side_by_side(np.asarray(condition.apply(x0)), np.asarray(x0), across=columns or 0)


class Rate(NamedTuple):
    """Examples a second of the clock, and of the processor's time (this process and its ended children)."""

    second: float
    cpu_second: float


def _timed(seconds: float, one: Any, batch_size: int) -> Rate:
    """Calls `one` for `seconds`, once before the clock starts."""
    one()
    start, cpu, done = time.perf_counter(), time.process_time(), 0
    while (elapsed := time.perf_counter() - start) < seconds or done < 3:
        one()
        done += 1
    elapsed = time.perf_counter() - start
    return Rate(done * batch_size / elapsed, done * batch_size / max(time.process_time() - cpu, 1e-9))


def _generator(made: Iterator[Any]) -> Generator[Any]:
    yield from made


def measure(config: configs.ConfigDict, source: Source, seconds: float = 3.0) -> dict[str, Rate]:
    """The pipeline alone: "host", batches in the host's memory; "devices", through Batches as training gets them."""
    size = config.train.batch_size
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    sharding.check_batch(mesh, size)
    place = sharding.batch_sharding(mesh)
    tasks: Any = Tasks(source.order, config.seed, size, 0)
    with contextlib.closing(_generator(source.batches(tasks))) as made:
        out = {"host": _timed(seconds, lambda: next(made), size)}
    held = resident.load(source, config.data.on_device, place, lambda line: None)
    options = {"sharding": place, "prefetch_bytes": config.data.prefetch_bytes, "resident": held}
    with Batches(source, size, config.seed, 0, **options) as batches:
        out["devices"] = _timed(seconds, lambda: jax.block_until_ready(next(batches)), size)
    return out
