"""Turns any source into a packed folder, both splits of it: see packed.py for what lies in one."""

import contextlib
import errno
import io
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from jax_diffusion import data
from jax_diffusion.data import packed
from jax_diffusion.data.encoded import LazySource
from jax_diffusion.data.reader import Reader
from jax_diffusion.data.source import Once, Source
from jax_diffusion.errors import UserError, choose
from jax_diffusion.progress import Progress


@contextlib.contextmanager
def whole_folder(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to write in, which becomes `out` where all goes well, and is gone where it does not.

    Raises:
      UserError: `out` is there already, or the disk does not take it.
    """
    out = out.expanduser().absolute()
    if out.exists() or out.is_symlink():
        raise UserError(f"--out={out} is there already: nothing is overwritten, give a folder that is not")
    # Beside it, since only within one file system does a rename happen at once; hidden, and not to be taken for it.
    draft = out.with_name(f".{out.name}.unfinished-{os.getpid()}")
    try:
        draft.mkdir(parents=True)
        yield draft
        if out.exists():
            raise UserError(f"--out={out} has come into being meanwhile: nothing is overwritten")
        draft.rename(out)
        _sync(out.parent)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "make room, or choose --out on another disk" if full else "choose another --out"
        raise UserError(f"--out={out} cannot be written: {error.strerror or error}; {remedy}") from error
    finally:  # Ctrl-C too
        shutil.rmtree(draft, ignore_errors=True)


def _sync(folder: pathlib.Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def pack(data_config: Any, out: pathlib.Path, kind: str, shards: int = 1) -> list[str]:
    """Writes the folder `out`; returns lines that say what came of it.

    data_config: config.data.  kind: of packed.READERS.  shards: files of an array_record split.

    Raises:
      UserError: what can be mended; nothing is left of `out` then.
    """
    choose("--format", kind, packed.READERS)
    fields = dict(data_config.items()) if hasattr(data_config, "items") else vars(data_config)
    splits, lines = {}, []
    with whole_folder(out) as folder:
        train, held_out = _load(data_config)
        for split, source in {"train": train, "eval": held_out}.items():
            if source is None:
                continue
            progress = Progress(f"packing {split}", len(source))
            if kind == "array":
                _check_room(folder, source)
                files, how = packed.write_array(folder, split, source, progress.add), ""
            else:
                records, how = _records(fields, split, source)
                files = packed.write_array_record(folder, split, records, len(source), shards, progress.add)
            skipped = list(source.skipped)
            splits[split] = {"count": len(source), "files": files, "skipped": skipped, "name": source.name}
            size = sum(f["bytes"] for f in files.values()) / 2**20
            left = f", {len(skipped):,} corrupt left out" if skipped else ""
            lines.append(f"{split}: {len(source):,} examples, {size:,.1f} MiB in {len(files)} file(s){how}{left}")
        packed.write_manifest(folder, kind, train, splits, fields)
        _sync(folder)
    return [*lines, f"{out}: written"]


def _load(data_config: Any) -> tuple[Source, Source | None]:
    """(train, eval); eval is None where the recipe has none (holdout=0, and the set has no test part)."""
    once = Once()
    train = data.open_source(data_config, "train", once)
    try:
        return train, data.open_source(data_config, "eval", once)
    except UserError as error:
        if "holdout=0" in str(error):
            return train, None
        raise


def _check_room(folder: pathlib.Path, source: Source) -> None:
    one = source.batch(np.zeros(1, int))
    need, free = len(source) * sum(leaf.nbytes for leaf in one.values()), shutil.disk_usage(folder)[2]
    if need > free:
        raise OSError(errno.ENOSPC, f"it needs {need:,} bytes, and {free:,} are free")


def _records(fields: dict[str, Any], split: str, source: Source) -> tuple[Iterator[tuple[bytes, int | None]], str]:
    """(encoded image and label of each example, how they are encoded): as they were found, else as PNG."""
    one = source.batch(np.zeros(1, int))["image"]
    if one.dtype != np.uint8 or one.ndim != 4 or one.shape[-1] not in (1, 3):
        raise UserError(
            f"--format=array_record holds images, and {source.name} is {one.dtype} {one.shape[1:]}: use --format=array"
        )
    if isinstance(source, LazySource):
        return _found(source.reader, range(len(source)), stand_ins=True), ", files as they were"
    # What lies decoded in memory is opened once more, as if memory were too small for that.
    try:
        again = data.load(SimpleNamespace(**{**fields, "max_bytes": len(source) * source.shape[0] - 1}), split)
    except UserError:  # a compressed tar, say, has no other order
        again = None
    if not isinstance(again, LazySource):
        return _as_png(source), ", as PNG"
    whole: Sequence[int] = range(len(again))
    if len(again) != len(source):
        whole = [i for i in whole if again.reader(i) is not None]
    if len(whole) != len(source):
        return _as_png(source), ", as PNG"
    return _found(again.reader, whole, stand_ins=False), ", files as they were"


def _found(reader: Reader, which: Iterable[int], stand_ins: bool) -> Iterator[tuple[bytes, int | None]]:
    for i in which:
        while stand_ins and reader(i) is None:  # the next readable one, as when it is trained on
            i = (i + 1) % len(reader)
        yield reader.items.read(i)


def _as_png(source: Source) -> Iterator[tuple[bytes, int | None]]:
    from PIL import Image

    for batch in packed.chunks(source, 0, len(source)):
        for j, image in enumerate(batch["image"]):
            file = io.BytesIO()
            Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "PNG")
            yield file.getvalue(), int(batch["label"][j]) if "label" in batch else None
