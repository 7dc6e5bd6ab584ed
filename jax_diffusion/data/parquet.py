"""Hugging Face data sets on disk: parquet files as on the hub, or the .arrow files of save_to_disk.

An image column holds {bytes, path} or bytes, a label column integers; the class names stand in the schema's metadata.
Parquet can be read a row group at a time only: a set that does not fit into memory is read faster once packed.
"""

import collections
import json
import logging
import pathlib
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jax_diffusion.data import shards
from jax_diffusion.data.source import Once, Source
from jax_diffusion.errors import UserError

log = logging.getLogger("jax_diffusion.data")
NAMES = r".*\.(parquet|arrow)"
IMAGES = ("image", "img", "images", "jpg", "png", "webp")
LABELS = ("label", "labels", "fine_label", "cls", "class")
CACHE_BYTES = 256 << 20  # of row groups kept decompressed


class Columns(NamedTuple):
    """What a file's schema says."""

    image: str
    label: str | None
    class_names: tuple[str, ...]


def columns(schema: Any, path: pathlib.Path) -> Columns:
    """Finds the image, the label and the classes; UserError where there is no image."""
    import pyarrow as pa

    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        features = {}

    def encoded(field: Any) -> bool:
        kind = field.type
        if pa.types.is_struct(kind):
            kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else kind
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    def first(wanted: tuple[str, ...], able: list[str]) -> str | None:
        return next((name for name in (*wanted, *able) if name in able), None)

    def of_type(kind: str) -> list[str]:
        return [n for n, f in features.items() if isinstance(f, dict) and f.get("_type") == kind]

    able = [field.name for field in schema if encoded(field)]
    said = of_type("Image")
    image = first(IMAGES, [n for n in able if n in said] or able)
    if image is None:
        raise UserError(f"config.data.path: {path} has no column of encoded images, only {', '.join(schema.names)}")
    integers = [field.name for field in schema if pa.types.is_integer(field.type)]
    classed = [n for n in of_type("ClassLabel") if n in integers]
    # Of other integers only one that is called a label is one.
    label = first(LABELS, classed or [n for n in integers if n in LABELS])
    names = features.get(label, {}).get("names") or ()
    return Columns(image, label, tuple(map(str, names)))


class Rows:
    """The rows of some files, a row group at a time: `starts` are the first rows of the groups."""

    def __init__(self, files: shards.Files):
        self.files, self.groups, starts, rows = files, [], [], 0
        self.columns: Any = None  # Columns, the same of all files
        for f, file in enumerate(files):
            found, counts = _described(file)
            if self.columns is not None and found != self.columns:
                raise UserError(f"config.data.path: {file} has other columns or classes than {files[0]}")
            self.columns = found
            for g, count in enumerate(counts):
                self.groups.append((f, g))
                starts.append(rows)
                rows += count
        self.starts, self.count = np.asarray(starts), rows
        self._fresh()

    def _fresh(self) -> None:
        self._lock = threading.Lock()
        self._cache: collections.OrderedDict[int, Any] = collections.OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if not k.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._fresh()

    def __len__(self) -> int:
        return self.count

    def name(self, i: int) -> str:
        group, k = shards.locate(self.starts, i)
        return f"{self.files[self.groups[group][0]].name}[{k} of row group {self.groups[group][1]}]"

    def read(self, i: int) -> tuple[bytes, int | None]:
        group, k = shards.locate(self.starts, i)
        table = self._table(group)
        image = table.column(self.columns.image)[k].as_py()
        if isinstance(image, dict):
            image = image["bytes"]
        if image is None:
            raise ValueError("only the path of an image that lies elsewhere")
        label = table.column(self.columns.label)[k].as_py() if self.columns.label else None
        return image, None if label is None or label < 0 else label  # -1 is a hidden label

    def _table(self, group: int) -> Any:
        with self._lock:
            if group in self._cache:
                self._cache.move_to_end(group)
                return self._cache[group]
        f, g = self.groups[group]
        wanted = [self.columns.image, *([self.columns.label] if self.columns.label else [])]
        table = _read_group(self.files[f], g, wanted)
        with self._lock:
            self._cache[group] = table
            held = sum(t.nbytes for t in self._cache.values())
            while held > CACHE_BYTES and len(self._cache) > 1:
                held -= self._cache.popitem(last=False)[1].nbytes
        return table


def _guarded(path: pathlib.Path, read: Callable[[], Any]) -> Any:
    """What `read` gives; UserError where pyarrow cannot."""
    import pyarrow as pa

    try:
        return read()
    except (pa.ArrowException, OSError, EOFError) as error:
        raise UserError(f"config.data.path: {path} is damaged, or no such file ({str(error)[:200]})") from error


def _arrow(path: pathlib.Path) -> Any:
    """An .arrow file, of either of its two kinds, mapped into memory."""
    import pyarrow as pa

    file = pa.memory_map(str(path))
    try:
        return pa.ipc.open_file(file).read_all()
    except pa.ArrowInvalid:
        file.seek(0)
        return pa.ipc.open_stream(file).read_all()


def _described(path: pathlib.Path) -> tuple[Columns, list[int]]:
    """A file's columns, and the rows of each of its groups."""
    if path.suffix == ".arrow":
        table = _guarded(path, lambda: _arrow(path))
        return columns(table.schema, path), [table.num_rows]
    import pyarrow.parquet as pq

    def described() -> tuple[Any, list[int]]:
        with pq.ParquetFile(path, memory_map=True) as file:
            counts = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
            return file.schema_arrow, counts

    schema, counts = _guarded(path, described)
    return columns(schema, path), counts


def _read_group(path: pathlib.Path, group: int, wanted: list[str]) -> Any:
    if path.suffix == ".arrow":
        return _arrow(path).select(wanted)
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, memory_map=True) as file:
        return file.read_row_group(group, columns=wanted, use_threads=False)


def _opened(files: shards.Files) -> Rows:
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise UserError("Hugging Face data sets need pyarrow: pip install pyarrow") from error
    return Rows(files)


def _classes(files: shards.Files, items: Any, once: Once) -> tuple[str, ...]:
    """From the schema, from a file beside the shards, or counted."""
    found = items.columns
    if found.label is None:
        return ()
    return found.class_names or shards.class_file(files) or shards.counted_classes(files, items)


def load(cfg: Any, split: str, once: Once) -> Source:
    """The *.parquet or *.arrow files of cfg.path: a folder, a pattern, or one file.

    Raises:
      UserError: no files, a damaged one, no pyarrow installed, or no column of images.
    """
    return shards.load(cfg, split, once, NAMES, "*.parquet or *.arrow files", _opened, _classes)
