"""ArrayRecord shards of tf.train.Example (as tensorflow-datasets writes them): records by number, in any order."""

import pathlib
from typing import Any

from jax_diffusion.data import packed, shards, tf_example
from jax_diffusion.data.reader import Encoded
from jax_diffusion.data.source import Once, Source
from jax_diffusion.errors import UserError

NAMES = r".*\.array_?record.*"


class Records:
    """The records of some shards, each of which `parse` takes apart."""

    def __init__(self, files: shards.Files, parse: Any = tf_example.parse):
        try:
            from array_record.python.array_record_data_source import ArrayRecordDataSource
        except ImportError as error:
            raise UserError("ArrayRecord shards need array_record: pip install array_record") from error
        self.files, self.parse = files, parse
        try:
            self.records = ArrayRecordDataSource([str(f) for f in files])
        except Exception as error:  # of the library's C++: a RuntimeError, or an absl status
            raise UserError(f"config.data.path: {_damaged(files)} is no readable ArrayRecord file ({error})") from error

    def __len__(self) -> int:
        return len(self.records)

    def name(self, i: int) -> str:
        return f"{self.files[0].parent}[{i}]"

    def read(self, i: int) -> tuple[bytes, int | None]:
        return self.parse(self.records[i])


def _damaged(files: shards.Files) -> pathlib.Path:
    """The first file that cannot be opened."""
    from array_record.python.array_record_module import ArrayRecordReader

    for file in files:
        try:
            ArrayRecordReader(str(file)).close()
        except Exception:  # see above
            return file
    return files[0].parent


def classes(files: shards.Files, items: Encoded, once: Once) -> tuple[str, ...]:
    """From a file beside the shards, else counted."""
    return shards.class_file(files) or shards.counted_classes(files, items)


def load(cfg: Any, split: str, once: Once) -> Source:
    """The *.array_record shards of cfg.path: a folder, a pattern, or one file; or a folder that `data pack` wrote.

    Raises:
      UserError: no shards, a damaged one, no array_record installed, or no images in the records.
    """
    if cfg.path and (pathlib.Path(cfg.path).expanduser() / packed.MANIFEST).is_file():
        return packed.load(cfg, split, once)
    return shards.load(cfg, split, once, NAMES, "*.array_record shards", Records, classes)
