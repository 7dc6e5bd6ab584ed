"""Files by name, wherever they lie: in a folder, a zip or a tar. Nothing is unpacked to disk."""

import os
import pathlib
import posixpath
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


class Tree(NamedTuple):
    """Images by their posix path below the root; `read` may be called from many threads."""

    names: list[str]  # sorted
    read: Callable[[str], bytes]


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
        try:
            return _tar(root)
        except tarfile.ReadError:
            return _compressed_tar(root, max_bytes)
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
    for folder, _, files in os.walk(root, followlinks=True):
        below = pathlib.Path(folder).relative_to(root)
        names += [(below / f).as_posix() for f in files]
    return Tree(sorted(filter(_is_image, names)), lambda name: (root / name).read_bytes())


def _zip(root: pathlib.Path) -> Tree:
    archive = zipfile.ZipFile(root)  # locks its file around each read
    where = {posixpath.normpath(i.filename): i for i in archive.infolist() if not i.is_dir()}
    return Tree(sorted(filter(_is_image, where)), lambda name: archive.read(where[name]))


def _tar(root: pathlib.Path) -> Tree:
    """A plain tar keeps each file in one piece: remember where, and read just that."""
    with tarfile.open(root, "r:") as archive:
        where = {posixpath.normpath(m.name): (m.size, m.offset_data) for m in archive if m.isfile()}

    def read(name: str) -> bytes:
        size, offset = where[name]
        with open(root, "rb") as file:  # its own position: threads share nothing
            file.seek(offset)
            return file.read(size)

    return Tree(sorted(filter(_is_image, where)), read)


def _compressed_tar(root: pathlib.Path, max_bytes: int) -> Tree:
    data, held = {}, 0
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
            data[name] = archive.extractfile(member).read()
    return Tree(sorted(data), data.__getitem__)
