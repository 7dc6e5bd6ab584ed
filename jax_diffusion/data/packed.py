"""Packed sets: a folder that `jax-diffusion data pack` wrote, read without decoding or without searching.

In it lie:

    manifest.json      format, version, shape, dtype, classes; of each split the count, its files with their sizes and
                       SHA-256, the corrupt files that were left out; where it came from
    train.npy          --format=array: uint8 [N, H, W, C] or float32 [N, ...], memory-mapped when read
    train-labels.npy   int32 [N], where there are labels
    eval.npy ...       the held-out part, as the recipe parted it
    train-00000-of-00016.array_record ...   --format=array_record: encoded images and their labels
"""

import errno
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np

from jax_diffusion.data import tf_example
from jax_diffusion.data.images import Format
from jax_diffusion.data.source import ArraySource, Once, Source, split_indices
from jax_diffusion.errors import UserError

VERSION = 1
CHUNK = 256  # examples read, and written, at a time
MANIFEST = "manifest.json"


class Hashed:
    """A file that is written once, from front to back; `done` syncs it and gives its size and SHA-256."""

    def __init__(self, path: pathlib.Path):
        self.file: BinaryIO = path.open("xb")
        self.digest, self.size = hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> int:
        self.file.write(data)
        self.digest.update(data)
        self.size += len(data)
        return len(data)

    def done(self) -> dict[str, Any]:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return {"bytes": self.size, "sha256": self.digest.hexdigest()}


def chunks(source: Source, start: int, stop: int) -> Iterator[dict[str, np.ndarray]]:
    """Examples start..stop-1 in their order, a few at a time, made ahead where the source can."""
    return source.batches([np.arange(i, min(i + CHUNK, stop)) for i in range(start, stop, CHUNK)])


def write_array(
    folder: pathlib.Path, split: str, source: Source, done: Callable[[int], None]
) -> dict[str, dict[str, Any]]:
    """Writes one split as .npy; returns its files. done: told how many examples each piece had."""
    path, labels = folder / f"{split}.npy", []
    file: Any = None
    for batch in chunks(source, 0, len(source)):
        images = np.ascontiguousarray(batch["image"])
        if file is None:
            # Not a memory map: on a full disk the system would end the process instead of failing the write.
            file = Hashed(path)
            header = {"descr": images.dtype.str, "fortran_order": False, "shape": (len(source), *images.shape[1:])}
            np.lib.format.write_array_header_1_0(file, header)
        file.write(images.reshape(-1).view(np.uint8).data)
        labels += [batch["label"]] if "label" in batch else []
        done(len(images))
    out = {path.name: file.done()}
    if labels:
        path = folder / f"{split}-labels.npy"
        file = Hashed(path)
        np.lib.format.write_array(file, np.concatenate(labels).astype(np.int32))
        out[path.name] = file.done()
    return out


def write_array_record(
    folder: pathlib.Path,
    split: str,
    records: Iterable[tuple[bytes, int | None]],  # encoded image and label
    count: int,  # of them
    shards: int,
    done: Callable[[int], None],
) -> dict[str, dict[str, Any]]:
    """Writes one split as ArrayRecord files of tf.train.Example, cut in order; returns its files."""
    try:
        from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
    except ImportError as error:
        raise UserError("--format=array_record needs pip install array_record") from error
    if shards > count:
        raise UserError(f"--shards={shards} are more than the {count} examples of {split}: use fewer")
    bounds, records, out = np.linspace(0, count, shards + 1).astype(int), iter(records), {}
    for s, (start, stop) in enumerate(itertools.pairwise(bounds)):
        path = folder / f"{split}-{s:05d}-of-{shards:05d}.array_record"
        try:
            writer = ArrayRecordWriter(str(path), "group_size:1")  # any record by itself
            for image, label in itertools.islice(records, stop - start):
                writer.write(tf_example.serialised(image, label))
                done(1)
            writer.close()
            reader = ArrayRecordReader(str(path))
            found = reader.num_records()
            reader.close()
        except RuntimeError as error:  # an absl status of its C++
            raise OSError(_errno(error), str(error)) from error
        if found != stop - start:
            raise OSError(errno.EIO, f"{path.name} has {found} records, not {stop - start}")
        out[path.name] = {"bytes": path.stat().st_size, "sha256": digest(path)}
    return out


def _errno(error: RuntimeError) -> int:
    full = "No space left" in str(error) or "RESOURCE_EXHAUSTED" in str(error)
    return errno.ENOSPC if full else errno.EIO


def digest(path: pathlib.Path, done: Callable[[int], None] = lambda n: None) -> str:
    """The SHA-256 of a file. done: told of bytes read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
            done(len(piece))
    return digest.hexdigest()


def write_manifest(
    folder: pathlib.Path, kind: str, train: Source, splits: dict[str, Any], fields: dict[str, Any]
) -> None:
    """Writes manifest.json, last of all: a folder without one is no packed set."""
    one = train.batch(np.zeros(1, int))["image"]
    manifest = {
        "format": kind,
        "version": VERSION,
        "shape": [int(n) for n in train.shape],
        "dtype": one.dtype.name,
        "num_classes": train.num_classes,
        "class_names": list(train.class_names),
        "splits": splits,
        "source": {k: v for k, v in fields.items() if v not in ("", ())},
    }
    with (folder / MANIFEST).open("x") as file:
        json.dump(manifest, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def read_manifest(path: str | pathlib.Path) -> dict[str, Any]:
    """The manifest of a packed folder.

    Raises:
      UserError: there is none, it is damaged, or of a younger version.
    """
    file = pathlib.Path(path).expanduser() / MANIFEST
    try:
        manifest = json.loads(file.read_text())
        known = manifest["version"] <= VERSION
        if known:
            _check_fields(manifest)
    except OSError as error:
        raise UserError(
            f"config.data.path={str(path)!r} is no packed set ({file.name}: {error.strerror}): make one with "
            "jax-diffusion data pack --config=RECIPE --out=FOLDER"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"config.data.path: {file} is damaged ({type(error).__name__}: {error}); pack again") from error
    if not known:
        raise UserError(f"config.data.path: {file} is of version {manifest['version']}: update jax_diffusion")
    return manifest


def _check_fields(manifest: dict[str, Any]) -> None:
    """Raises KeyError, TypeError, AttributeError or ValueError where something is missing or of another type."""
    for values, kind in (
        (manifest["shape"], int),
        (manifest["class_names"], str),
        ((manifest["dtype"], manifest["format"]), str),
        ((manifest["num_classes"] or 0,), int),
        (manifest["splits"]["train"]["files"], str),
        *((part["skipped"], str) for part in manifest["splits"].values()),
        *(((part["count"],), int) for part in manifest["splits"].values()),
        *(((f["bytes"],), int) for part in manifest["splits"].values() for f in part["files"].values()),
    ):
        if not all(isinstance(value, kind) for value in values):
            raise TypeError(f"{values} should be of {kind.__name__}")
    if manifest["format"] not in READERS or not manifest["shape"]:
        raise ValueError(f"format {manifest['format']}, shape {manifest['shape']}")


def damaged(path: str | pathlib.Path, done: Callable[[int], None] = lambda n: None) -> list[str]:
    """What of a packed folder is not as it was written, a line a file; reads all of it. done: told of bytes read."""
    folder, out = pathlib.Path(path).expanduser(), []
    for part in read_manifest(folder)["splits"].values():
        for name, wanted in part["files"].items():
            try:
                if digest(folder / name, done) != wanted["sha256"]:
                    out.append(f"{name}: its SHA-256 is not the manifest's")
            except OSError as error:
                out.append(f"{name}: {error.strerror}")
    return out


def load(cfg: Any, split: str, once: Once) -> Source:
    """A packed split. Eval is the part that was held out when it was packed, else the held-out share.

    Raises:
      UserError: no packed set, files missing or cut, or another size or colour is wanted than was packed.
    """
    manifest, folder = read_manifest(cfg.path), pathlib.Path(cfg.path).expanduser()
    parts = manifest["splits"]
    part = split if split in parts else "train"
    for name, wanted in parts[part]["files"].items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else -1
        if size != wanted["bytes"]:
            found = "is missing" if size < 0 else f"has {size:,} bytes, not {wanted['bytes']:,}"
            raise UserError(f"config.data.path: {folder / name} {found}; pack again")
    rows = None
    if "eval" not in parts and (cfg.holdout or split == "eval"):
        rows = split_indices(parts[part]["count"], cfg.holdout, split, str(cfg.path))
    return READERS[manifest["format"]](folder, part, manifest, cfg, rows)


def _check_format(manifest: dict[str, Any], cfg: Any) -> None:
    fmt, shape = Format.from_config(cfg), tuple(manifest["shape"])
    if (fmt.size and fmt.size != shape[:2]) or (fmt.channels and fmt.channels != shape[-1]):
        raise UserError(
            f"config.data.path={cfg.path!r} was packed as {'x'.join(map(str, shape))}: leave "
            "--config.data.size=() and --config.data.channels=0, or pack again with those wanted"
        )


def read_array(folder: pathlib.Path, part: str, manifest: dict[str, Any], cfg: Any, rows: np.ndarray | None) -> Source:
    """A split that write_array wrote, memory-mapped."""
    _check_format(manifest, cfg)
    count, shape = manifest["splits"][part]["count"], tuple(manifest["shape"])
    images = _mapped(folder / f"{part}.npy")
    if images.shape != (count, *shape) or images.dtype.name != manifest["dtype"]:
        raise UserError(f"config.data.path: {folder / f'{part}.npy'} is not what its manifest says; pack again")
    labels = folder / f"{part}-labels.npy"
    wanted = cfg.labels and manifest["num_classes"]
    return ArraySource(
        images,
        np.array(_mapped(labels)) if wanted else None,
        name=str(cfg.path),
        num_classes=manifest["num_classes"] if wanted else None,
        class_names=manifest["class_names"] if wanted else (),
        skipped=manifest["splits"][part]["skipped"],
        rows=rows,
    )


def read_array_record(
    folder: pathlib.Path, part: str, manifest: dict[str, Any], cfg: Any, rows: np.ndarray | None
) -> Source:
    """A split that write_array_record wrote: decoded into memory, or batch by batch, as any set of encoded images."""
    from jax_diffusion.data.array_record import Records
    from jax_diffusion.data.encoded import open_encoded
    from jax_diffusion.data.reader import Subset

    items = Records(tuple(folder / name for name in manifest["splits"][part]["files"]))
    chosen = items if rows is None else Subset(items, rows)
    class_names = manifest["class_names"] if cfg.labels and manifest["num_classes"] else ()
    return open_encoded(chosen, cfg, name=str(cfg.path), class_names=class_names)


READERS: dict[str, Callable] = {"array": read_array, "array_record": read_array_record}


def _mapped(path: pathlib.Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a damaged header is Python that fails in a dozen ways
        raise UserError(f"config.data.path: {path} cannot be read ({error}); pack again") from error
