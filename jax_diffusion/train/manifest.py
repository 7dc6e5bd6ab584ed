"""Every file of a checkpoint with its size and CRC, in a file of its folder.

It is written when all else of a checkpoint is on the disk and before the checkpoint gets its name, so that one that has
its name has a manifest, and a damaged or missing file is named before anything is read from it.
"""

import concurrent.futures
import json
import os
import pathlib
import zlib
from collections.abc import Sequence

from jax_diffusion.progress import Progress

NAME = "MANIFEST"
# What orbax still writes when the manifest is done: the time of the commit, and a word that it took place.
METADATA, COMMITTED = "_CHECKPOINT_METADATA", "commit_success.txt"
THREADS, CHUNK = 8, 1 << 23


def _crc(path: pathlib.Path) -> tuple[int, int]:
    """Size and CRC32 of a file."""
    size = crc = 0
    with path.open("rb") as f:
        while chunk := f.read(CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return size, crc


def _lasting(metadata: bytes) -> dict:
    """The fields of _CHECKPOINT_METADATA that do not change any more. ValueError where it is none."""
    fields = json.loads(metadata)
    if not isinstance(fields, dict):
        raise ValueError("no object")
    return {k: v for k, v in fields.items() if k != "commit_timestamp_nsecs"}


def write(folder: pathlib.Path) -> None:
    """Writes the manifest of a checkpoint's folder, on the disk when it returns."""
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    names = [name for name in names if name not in (NAME, METADATA, COMMITTED)]
    with concurrent.futures.ThreadPoolExecutor(THREADS) as threads:
        files = dict(zip(names, threads.map(_crc, [folder / name for name in names]), strict=True))
    body = {"files": files, "metadata": _lasting((folder / METADATA).read_bytes())}
    text = json.dumps(body, indent=0).encode()
    with (folder / NAME).open("wb") as f:
        f.write(b"%08x\n" % zlib.crc32(text) + text)
        f.flush()
        os.fsync(f.fileno())


def _read(folder: pathlib.Path) -> dict:
    crc, _, text = (folder / NAME).read_bytes().partition(b"\n")
    if crc != b"%08x" % zlib.crc32(text):
        raise ValueError("it does not have the bytes that were written")
    return json.loads(text)


def problem(folder: pathlib.Path, items: Sequence[str] | None = None, part: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with the files of a checkpoint, naming the first; None where all have the bytes that were written.

    items: look at these of its items alone.  part: (i, n): at every n-th file alone, from the i-th.
    """
    try:
        body = _read(folder)
    except FileNotFoundError:
        return f"{folder / NAME} is missing"
    except (OSError, ValueError) as e:
        return f"{folder / NAME} is damaged: {e}"
    try:
        found = _lasting((folder / METADATA).read_bytes())
    except FileNotFoundError:
        return f"{folder / METADATA} is missing"
    except (OSError, ValueError) as e:
        return f"{folder / METADATA} is damaged: {e}"
    if found != body["metadata"]:
        return f"{folder / METADATA} does not hold what was written"
    if not (folder / COMMITTED).is_file():
        return f"{folder / COMMITTED} is missing"
    files = {n: tuple(v) for n, v in body["files"].items() if items is None or n.split("/")[0] in items}
    files = dict(list(files.items())[part[0] :: part[1]])
    with concurrent.futures.ThreadPoolExecutor(THREADS) as threads:
        progress = Progress(f"checking checkpoint {folder.name}, MB", sum(size for size, _ in files.values()) >> 20)
        for name, why in zip(files, threads.map(lambda n: _differs(folder / n, *files[n]), files), strict=True):
            if why:
                return why
            progress.add(files[name][0] >> 20)
    return None


def _differs(path: pathlib.Path, size: int, crc: int) -> str | None:
    try:
        there = path.stat().st_size
        if there != size:
            return f"{path} has {there:,} bytes instead of {size:,}"
        if _crc(path) != (size, crc):
            return f"{path} does not have the bytes that were written"
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as e:
        return f"{path} cannot be read: {e.strerror or e}"
    return None
