"""Data: `load(config.data, split)` gives a Source, `Batches` its batches on the devices.

A new kind of data is one file with a function `load(cfg, split) -> Source` and one line in SOURCES.
"""

from collections.abc import Callable
from typing import Any

from jax_diffusion.data import digits, folder, idx, numpy_files, tfds_records, toy2d
from jax_diffusion.data.augment import random_flip, to_float, to_uint8
from jax_diffusion.data.pipeline import Batches, batch_indices
from jax_diffusion.data.source import ArraySource, Source
from jax_diffusion.errors import choose

SOURCES: dict[str, Callable[[Any, str], Source]] = {
    "digits": digits.load,
    "idx": idx.load,
    "folder": folder.load,
    "tfds": tfds_records.load,
    "numpy": numpy_files.load,
    "toy2d": toy2d.load,
}


def load(data_config: Any, split: str) -> Source:
    """Opens one split of a data set.

    Args:
      data_config: attributes source, path, name, size, channels, crop, labels, holdout, max_bytes and,
        for folder and numpy, optionally eval_path; see the sources for which are used.
      split: "train" or "eval". The two never share an example.

    Raises:
      UserError: anything the user can mend, in one line.
    """
    choose("split", split, ("train", "eval"))
    return SOURCES[choose("config.data.source", data_config.source, SOURCES)](data_config, split)


__all__ = [
    "SOURCES",
    "ArraySource",
    "Batches",
    "Source",
    "batch_indices",
    "load",
    "random_flip",
    "to_float",
    "to_uint8",
]
