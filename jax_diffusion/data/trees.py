"""Files by name, wherever they lie: in a folder, a zip or a tar. Nothing is unpacked to disk."""

import functools
import os
import pathlib
import posixpath
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from typing import NamedTuple

from jax_diffusion.errors import UserError

SUFFIXES = {  # what Pillow reads
    ".jpg",
    ".jpeg",
    ".jfif",
    ".jp2",
    ".png",
    ".webp",
    ".avif",
    ".gif",
    ".bmp",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
    ".pbm",
}


COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # how gzip, bzip2, xz and zstd begin
READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
MAX_FILE = 512 << 20  # bytes: no image that may be decoded is as large, and what claims to be is not read


class Tree(NamedTuple):
    """Images by their posix path below the root; `read` may be called from many threads and processes."""

    names: list[str]  # sorted
    read: Callable[[str], bytes]  # OSError or ValueError where there is no such file any more, or a vast one


def open_tree(path: str, max_bytes: int) -> Tree:
    """Lists the images of a folder, or of a .zip, .tar, .tar.gz (.tgz, .tar.xz, .tar.bz2) archive.

    Args:
      path: the folder or the archive.
      max_bytes: how much of a compressed tar may be held in memory: it cannot be read in any other order.

    Raises:
      UserError: nothing is there, it is no archive, or the archive is damaged or too large.
    """
    root = pathlib.Path(path).expanduser()
    if not path or not root.exists():
        raise UserError(f"config.data.path={path!r} does not exist: give a folder of images, or a .tar or .zip")
    if root.is_dir():
        return _folder(root)
    try:
        if zipfile.is_zipfile(root):
            return _zip(root)
        with root.open("rb") as file:
            compressed = file.read(6).startswith(COMPRESSED)
        return _compressed_tar(root, max_bytes) if compressed else _tar(root)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError, zlib.error) as error:
        raise UserError(
            f"config.data.path={path!r} is neither a folder nor a readable .tar, .tar.gz or .zip ({error})"
        ) from error


def _is_image(name: str) -> bool:
    parts = name.split("/")
    # "._a.jpg" and __MACOSX are what macOS leaves in archives.
    hidden = any(p.startswith(".") or p == "__MACOSX" for p in parts)
    return not hidden and posixpath.splitext(parts[-1])[1].lower() in SUFFIXES


def _folder(root: pathlib.Path) -> Tree:
    names = []
    above = {str(root): {_identity(root)}}  # of each folder still to come: those that it lies in, and itself
    for folder, folders, files in os.walk(root, followlinks=True):
        below, inside = pathlib.Path(folder).relative_to(root), above.pop(folder)
        names += [(below / f).as_posix() for f in files]
        # A link to a folder above would be followed for ever, or 40 deep, and two of them 2^40 ways.
        known = {f: _identity(os.path.join(folder, f)) for f in folders}
        folders[:] = [f for f in folders if known[f] not in inside]
        above |= {os.path.join(folder, f): inside | {known[f]} for f in folders}
    return Tree(sorted(filter(_is_image, names)), functools.partial(_read_file, root))


def _identity(folder: str | pathlib.Path) -> tuple[int, int]:
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def _read_file(root: pathlib.Path, name: str) -> bytes:
    # By its number: pathlib's Python is a fifth of a small image's time. To open a pipe would be to wait.
    handle, data = os.open(f"{root}/{name}", READ), b""
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("no file, to read from which may take for ever")
        _check_size(found.st_size)
        while len(data) < found.st_size and (piece := os.read(handle, found.st_size - len(data))):
            data = data + piece if data else piece
        return data
    finally:
        os.close(handle)


def _check_size(size: int) -> None:
    if size > MAX_FILE:
        raise ValueError(f"{size:,} bytes")


def _zip(root: pathlib.Path) -> Tree:
    archive = _Zip(root)
    return Tree(sorted(filter(_is_image, archive.where)), archive.read)


class _Zip:
    """A zip archive, opened again where it is sent to."""

    def __init__(self, root: pathlib.Path):
        self.root = root
        self.archive = zipfile.ZipFile(root)  # locks its file around each read
        self.where = {posixpath.normpath(i.filename): i for i in self.archive.infolist() if not i.is_dir()}

    def __reduce__(self) -> tuple:
        return _Zip, (self.root,)

    def read(self, name: str) -> bytes:
        # What is declared is what is read: zipfile stops there, and then finds that the checksum is another.
        _check_size(self.where[name].file_size)
        return self.archive.read(self.where[name])


def _tar(root: pathlib.Path) -> Tree:
    """A plain tar keeps each file in one piece: remember where, and read just that."""
    with tarfile.open(root, "r:") as archive:
        where = {posixpath.normpath(m.name): (m.size, m.offset_data) for m in archive if m.isfile()}
    return Tree(sorted(filter(_is_image, where)), functools.partial(_read_part, root, where))


def _read_part(root: pathlib.Path, where: dict[str, tuple[int, int]], name: str) -> bytes:
    size, offset = where[name]
    _check_size(size)
    with open(root, "rb") as file:  # its own position: threads share nothing
        file.seek(offset)
        return file.read(size)


class _Held(dict):
    """Files in memory, which stay in this process."""

    def __reduce__(self) -> tuple:
        raise UserError(
            "config.data.workers: the files of a compressed tar are in this process's memory; unpack it, make it a "
            "plain .tar, or set --config.data.workers=0"
        )


def _compressed_tar(root: pathlib.Path, max_bytes: int) -> Tree:
    data, held = _Held(), 0
    with tarfile.open(root, "r|*") as archive:
        for member in archive:
            name = posixpath.normpath(member.name)
            if not (member.isfile() and _is_image(name)):
                continue
            held += member.size
            if held > max_bytes:
                raise UserError(
                    f"config.data.path={str(root)!r} holds more than config.data.max_bytes={max_bytes:,} "
                    "bytes of compressed images, which must be in memory: unpack it, or make it a plain .tar"
                )
            file = archive.extractfile(member)
            assert file is not None  # of a plain file there is one
            data[name] = file.read()
    return Tree(sorted(data), functools.partial(_held, data))


def _held(data: _Held, name: str) -> bytes:
    return data[name]
