"""Data: `load(config.data, split)` gives a Source, `Batches` its batches on the devices.

A new kind of data is one file with a function `load(cfg, split, once) -> Source` and one line in SOURCES.
"""

from collections.abc import Callable
from typing import Any

from jax_diffusion.data import (
    array_record,
    digits,
    folder,
    idx,
    mixture,
    numpy_files,
    packed,
    parquet,
    tfds_records,
    tfrecord,
    toy2d,
)
from jax_diffusion.data.augment import random_flip, to_float, to_uint8
from jax_diffusion.data.order import batch_indices
from jax_diffusion.data.pipeline import Batches
from jax_diffusion.data.source import ArraySource, Once, Source
from jax_diffusion.errors import choose

SOURCES: dict[str, Callable[[Any, str, Once], Source]] = {
    "digits": digits.load,
    "idx": idx.load,
    "folder": folder.load,
    "tfds": tfds_records.load,
    "numpy": numpy_files.load,
    "packed": packed.load,
    "array_record": array_record.load,
    "tfrecord": tfrecord.load,
    "parquet": parquet.load,
    "mixture": mixture.load,
    "toy2d": toy2d.load,
}


def load(data_config: Any, split: str) -> Source:
    """Opens one split of a data set.

    Args:
      data_config: attributes source, path, name, size, channels, crop, labels, holdout, max_bytes and optionally
        eval_path, max_pixels, workers and mixture; see the sources for which are used.
      split: "train" or "eval". The two never share an example.

    Raises:
      UserError: anything the user can mend, in one line.
    """
    return load_splits(data_config, split)[0]


def load_splits(data_config: Any, *splits: str) -> tuple[Source, ...]:
    """Opens several splits, as `load` does each; what they share is read, listed or decompressed once."""
    once = Once()
    return tuple(open_source(data_config, split, once) for split in splits)


def open_source(data_config: Any, split: str, once: Once) -> Source:
    """`load`, where others may have opened what it needs."""
    choose("split", split, ("train", "eval"))
    return SOURCES[choose("config.data.source", data_config.source, SOURCES)](data_config, split, once)


__all__ = [
    "SOURCES",
    "ArraySource",
    "Batches",
    "Source",
    "batch_indices",
    "load",
    "load_splits",
    "random_flip",
    "to_float",
    "to_uint8",
]
