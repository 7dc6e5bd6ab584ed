"""TFRecord shards of tf.train.Example, read in any order through an index of where each record lies.

A record is its length as a little-endian uint64, that one's checksum, the data, and its checksum: a CRC-32C, masked
(https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details).
"""

import functools
import pathlib
import struct
from typing import Any

import numpy as np

from jax_diffusion.data import shards, tf_example
from jax_diffusion.data.array_record import classes
from jax_diffusion.data.source import Once, Source
from jax_diffusion.errors import UserError
from jax_diffusion.progress import Progress

NAMES = r".*\.tfrecords?(-\d+.*)?|(?!.*array_record).*-\d{5}-of-\d{5}"
HEADER = struct.Struct("<QI")
FOOTER = struct.Struct("<I")
MASK_DELTA = 0xA282EAD8


def masked_crc(data: bytes) -> int:
    """The CRC-32C of some bytes, rotated right by 15 bits, plus a constant."""
    from google_crc32c import value

    crc = value(data)
    return ((crc >> 15 | crc << 17) + MASK_DELTA) & 0xFFFFFFFF


class Records:
    """The records of some TFRecord files."""

    def __init__(self, files: shards.Files):
        try:
            import google_crc32c  # noqa: F401
        except ImportError as error:
            raise UserError("TFRecord shards need google-crc32c: pip install google-crc32c") from error
        self.files = files
        progress = Progress(f"indexing {files[0].parent}", sum(f.stat().st_size for f in files))
        self.offsets = []  # of each file's records, uint64 [n + 1]; the last is the file's end
        for file in files:
            memory = shards.Memory("tfrecord", [file])
            index = memory.get(lambda f: np.load(f, allow_pickle=False))
            if index is None:
                index = offsets(file)
                memory.put(functools.partial(_save, index=index))
            self.offsets.append(index)
            progress.add(int(index[-1]))
        counts = [len(index) - 1 for index in self.offsets]
        self.starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        self.count = sum(counts)

    def __len__(self) -> int:
        return self.count

    def name(self, i: int) -> str:
        part, k = shards.locate(self.starts, i)
        return f"{self.files[part].name}[{k}]"

    def read(self, i: int) -> tuple[bytes, int | None]:
        part, k = shards.locate(self.starts, i)
        start, end = map(int, self.offsets[part][k : k + 2])
        with open(self.files[part], "rb") as file:  # its own position: threads share nothing
            file.seek(start)
            record = file.read(end - start)
        data = record[HEADER.size : -FOOTER.size]
        if len(record) != end - start or masked_crc(data) != FOOTER.unpack(record[-FOOTER.size :])[0]:
            raise ValueError("its checksum is another")
        return tf_example.parse(data)


def _save(path: pathlib.Path, index: np.ndarray) -> None:
    with path.open("wb") as file:  # np.save would add a suffix to the name
        np.save(file, index)


def offsets(path: pathlib.Path) -> np.ndarray:
    """Where each record of a file begins, and where the last ends: uint64 [n + 1]. Reads the headers only.

    Raises:
      UserError: no TFRecord file, a compressed or a damaged one.
    """
    size, at, out = path.stat().st_size, 0, [0]
    with path.open("rb") as file:
        while at < size:
            file.seek(at)
            header = file.read(HEADER.size)
            length, crc = HEADER.unpack(header.ljust(HEADER.size, b"\0"))
            if at == 0 and header[:2] in (b"\x1f\x8b", b"\x78\x9c"):
                raise UserError(f"config.data.path: {path} is compressed, which leaves no random access: decompress it")
            if masked_crc(header[:8]) != crc:
                what = f"is damaged at byte {at:,}" if at else "is no TFRecord file"
                raise UserError(f"config.data.path: {path} {what}: fetch it again, or take it away")
            at += HEADER.size + length + FOOTER.size
            if at > size:
                raise UserError(f"config.data.path: {path} is truncated: fetch it again, or take it away")
            out.append(at)
    return np.asarray(out, np.uint64)


def load(cfg: Any, split: str, once: Once) -> Source:
    """The TFRecord shards of cfg.path: a folder, a pattern, or one file.

    Raises:
      UserError: no shards, a damaged one, no google-crc32c installed, or no images in the records.
    """
    return shards.load(cfg, split, once, NAMES, "*.tfrecord shards", Records, classes)
