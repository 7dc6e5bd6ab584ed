"""Files that are there whole or not at all: another process, or a later run, may be reading them."""

import contextlib
import os
import pathlib
from collections.abc import Iterator


@contextlib.contextmanager
def whole(path: str | pathlib.Path, *, lasting: bool = False) -> Iterator[pathlib.Path]:
    """Yields the path of a draft beside `path` to write to, which takes its place when the block is left without error.

    lasting: it is on the disk, and not only with the system, before it does.
    """
    path = pathlib.Path(path)
    draft = path.with_name(f"{path.name}.draft")
    yield draft
    if lasting:
        with draft.open("rb+") as f:
            os.fsync(f.fileno())
    draft.replace(path)
