"""MNIST's IDX files, and those of the sets that took the format over (Fashion-MNIST, KMNIST, EMNIST).

A file is: two zero bytes, a type code, the number of axes n, n big-endian uint32 sizes, the data
(http://yann.lecun.com/exdb/mnist/).
"""

import gzip
import pathlib
import re
import struct
import zlib
from typing import Any

import numpy as np

from jax_diffusion.data.images import Format, fit
from jax_diffusion.data.source import ArraySource, Once, Source, split_indices
from jax_diffusion.errors import UserError

DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
IMAGES = re.compile(r"(?P<prefix>.*?)(?P<part>train|t10k|test)-images[-.]idx\d-ubyte(\.gz)?")


MAX_AXES = 8  # of an array; what says more is damaged


def read_idx(path: str | pathlib.Path) -> np.ndarray:
    """Reads one IDX file, gzipped or not, into an array of the shape it declares.

    Raises:
      UserError: it is missing, truncated, or not IDX.
    """
    path = pathlib.Path(path)
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"config.data.path: {path} cannot be read or is truncated ({error})") from error
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in DTYPES or not 1 <= data[3] <= MAX_AXES:
        raise UserError(f"config.data.path: {path} is no IDX file: it begins with {data[:4].hex() or 'nothing'}")
    dtype, ndim = np.dtype(DTYPES[data[2]]), data[3]
    start = 4 + 4 * ndim
    shape = struct.unpack(f">{ndim}I", data[4:start].ljust(4 * ndim, b"\xff"))  # a cut header declares too much
    wanted = int(np.prod(shape, dtype=np.float64)) * dtype.itemsize
    if len(data) - start != wanted:
        raise UserError(
            f"config.data.path: {path} is truncated or damaged: it declares shape {shape} of {dtype.name}, "
            f"{wanted:,} bytes, and holds {max(0, len(data) - start):,}"
        )
    array = np.frombuffer(data, dtype, offset=start).reshape(shape)
    return array.astype(dtype.newbyteorder("="))


def load(cfg: Any, split: str, once: Once) -> Source:
    """The images of cfg.path (a folder, or the training images' file); eval is t10k where it is there."""
    train, test = _find(cfg.path)
    train_labels = once(_labels_of, train) if cfg.labels else None
    use = test if split == "eval" and test else train
    images = once(read_idx, use)
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise UserError(f"config.data.path: {use} holds {images.dtype} of shape {images.shape}, not images")
    images = images.reshape(*images.shape[:3], -1)
    labels = None if train_labels is None else train_labels if use == train else _labels_of(use)
    if cfg.labels and train_labels is not None and labels is None:
        raise UserError(f"config.data.path: {use} has no labels beside it, the training images have")
    if labels is not None and len(labels) != len(images):
        raise UserError(f"config.data.path: {use} holds {len(images)} images, its label file {len(labels)} labels")
    if not test:
        chosen = split_indices(len(images), cfg.holdout, split, str(train))
        images, labels = images[chosen], None if labels is None else labels[chosen]
    num_classes = None if train_labels is None else int(train_labels.max(initial=0)) + 1
    images = fit(images, Format.from_config(cfg), str(use))
    return ArraySource(images, labels, name=str(use), num_classes=num_classes)


def _find(path: str) -> tuple[pathlib.Path, pathlib.Path | None]:
    """(training images, test images or None)."""
    root = pathlib.Path(path).expanduser()
    if not path or not root.exists():
        raise UserError(f"config.data.path={path!r} does not exist: give the folder of train-images-idx3-ubyte.gz")
    if root.is_file():
        this = IMAGES.fullmatch(root.name)
        siblings = root.parent.iterdir() if this and this["part"] == "train" else []
        return root, _test_of(siblings, this["prefix"] if this else "")
    found = {p: m for p in sorted(root.iterdir()) if (m := IMAGES.fullmatch(p.name)) and m["part"] == "train"}
    if not found:
        raise UserError(f"config.data.path={path!r} holds no train-images-idx3-ubyte or .gz of it")
    prefixes = {m["prefix"] for m in found.values()}
    if len(prefixes) > 1:
        names = ", ".join(p.name for p in found)
        raise UserError(f"config.data.path={path!r} holds several sets ({names}): give one of these files")
    train, match = next(iter(found.items()))
    return train, _test_of(root.iterdir(), match["prefix"])


def _test_of(files: Any, prefix: str) -> pathlib.Path | None:
    def is_test(p: pathlib.Path) -> bool:
        m = IMAGES.fullmatch(p.name)
        return m is not None and m["part"] != "train" and m["prefix"] == prefix

    return next(filter(is_test, sorted(files)), None)


def _labels_of(images: pathlib.Path) -> np.ndarray | None:
    """The labels [N] in the file that belongs to an images file; None where there is none."""
    name = re.sub(r"-images([-.])idx\d", r"-labels\1idx1", images.name).removesuffix(".gz")
    for candidate in (name, name + ".gz"):
        path = images.with_name(candidate)
        if candidate != images.name and path.exists():
            labels = read_idx(path)
            if labels.ndim != 1 or labels.dtype.kind not in "iu":
                raise UserError(f"config.data.path: {path} holds {labels.dtype} of shape {labels.shape}, not labels")
            return labels
    return None
