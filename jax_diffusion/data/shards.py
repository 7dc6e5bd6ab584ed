"""Sets in many files: which files belong to which split, what a set's classes are, and what is remembered of them."""

import glob
import hashlib
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from jax_diffusion.data.encoded import open_encoded
from jax_diffusion.data.reader import Encoded, Subset
from jax_diffusion.data.source import Once, Source, split_indices
from jax_diffusion.errors import UserError
from jax_diffusion.progress import Progress

EVAL = ("test", "val", "valid", "validation", "eval")  # names of an eval set; the first one found is it
CLASS_FILES = ("classes.txt", "labels.txt", "*label.labels.txt")  # the last as tensorflow-datasets writes it
MOST_CLASSES = 100_000  # what exceeds it is no label

Files = tuple[pathlib.Path, ...]


def find(path: str, pattern: str, what: str, option: str = "config.data.path") -> Files:
    """The files of a folder (at any depth), of a glob pattern, or the one file, whose names match `pattern`.

    Raises:
      UserError: there are none.
    """
    root = pathlib.Path(path).expanduser()
    if path and root.is_dir():
        found = [p for p in root.rglob("*") if re.fullmatch(pattern, p.name) and not p.name.startswith(".")]
    elif path and root.is_file():
        found = [root]
    else:
        found = [pathlib.Path(p) for p in glob.glob(str(root), recursive=True)] if path else []
        found = [p for p in found if p.is_file()]
    if not found:
        raise UserError(
            f"{option}={path!r} holds no {what}: give their folder, a pattern such as 'data/train-*', or one"
        )
    return tuple(sorted(found, key=_natural))


def _natural(path: pathlib.Path) -> list[Any]:
    """Orders x_2 before x_10."""
    return [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", str(path))]


def splits(files: Files) -> tuple[Files, Files]:
    """(train, eval) by the words in the names of files and their folders; eval is empty where none says so.

    Of several eval sets (a validation and a test part) the first in EVAL is taken and the others are left out.

    Raises:
      UserError: only files of eval sets are there.
    """
    common = pathlib.Path(os.path.commonpath([f.parent for f in files]))
    kinds: dict[str, list[pathlib.Path]] = {}
    for file in files:
        # The file's own name says more than its folder's.
        for part in reversed(file.relative_to(common).parts):
            words = re.split(r"[^a-z]+", part.lower())
            kind = next((w for w in words if w == "train" or w in EVAL), None)
            if kind:
                break
        kinds.setdefault(kind or "", []).append(file)
    named = next((kind for kind in EVAL if kind in kinds), "none")
    if "train" in kinds:
        return tuple(kinds["train"]), tuple(kinds.get(named, ()))
    if "" not in kinds:
        raise UserError(f"config.data.path: {files[0]} and its neighbours are all of the {named} set, none of train")
    return tuple(kinds[""]), tuple(kinds.get(named, ()))


def load(
    cfg: Any,
    split: str,
    once: Once,
    pattern: str,  # of the files' names
    what: str,  # they are
    opened: Callable[[Files], Encoded],
    classes: Callable[[Files, Encoded, Once], tuple[str, ...]],  # of the train set
) -> Source:
    """A source of encoded images in shards; eval is cfg.eval_path, what the names say, or the held-out share."""
    train, test = splits(once(find, cfg.path, pattern, what))
    if eval_path := getattr(cfg, "eval_path", ""):
        test = once(find, eval_path, pattern, what, "config.data.eval_path")
    items = once(opened, train)
    class_names = once(classes, train, items, once) if cfg.labels else ()
    name = cfg.path
    if split == "eval" and test:
        items, name = once(opened, test), eval_path or f"{cfg.path} (eval)"
    elif not test:
        items = Subset(items, split_indices(len(items), cfg.holdout, split, cfg.path))
    return open_encoded(items, cfg, name=name, class_names=class_names)


def class_file(files: Files) -> tuple[str, ...]:
    """Class names, a line each, from a file beside the shards or in the folder above; () where there is none."""
    for folder in dict.fromkeys([files[0].parent, files[0].parent.parent]):
        for pattern in CLASS_FILES:
            for file in sorted(folder.glob(pattern)):
                return tuple(line.strip() for line in file.read_text().splitlines() if line.strip())
    return ()


def counted_classes(files: Files, items: Encoded) -> tuple[str, ...]:
    """Class names "0", "1", ... up to the largest label of all records, which are read through once and remembered.

    () where no record has a label. What cannot be read counts for nothing here: it is met again.
    """
    memory = Memory("labels", files)
    top = memory.get(lambda f: int(json.loads(f.read_text())))
    if top is None:
        top, progress = -1, Progress(f"reading the labels of {files[0].parent}", len(items))
        for i in range(len(items)):
            try:
                label = items.read(i)[1]
            except Exception:  # of whatever kind: a damaged record
                label = None
            if label is not None and label < MOST_CLASSES:
                top = max(top, label)
            progress.add(1)
        memory.put(lambda f: f.write_text(json.dumps(top)))
    return tuple(map(str, range(top + 1)))


class Memory:
    """What was found out about some files, kept in the user's cache folder until one of them changes."""

    def __init__(self, kind: str, files: Iterable[pathlib.Path]):
        said = [(str(f.resolve()), (s := f.stat()).st_size, s.st_mtime_ns) for f in files]
        key = hashlib.sha256(repr(said).encode()).hexdigest()[:32]
        root = os.environ.get("XDG_CACHE_HOME", "")
        home = pathlib.Path(root) if os.path.isabs(root) else pathlib.Path.home() / ".cache"
        self.path = home / "jax_diffusion" / "data" / f"{kind}-{key}"

    def get(self, read: Callable[[pathlib.Path], Any]) -> Any:
        """What `put` wrote, or None: never written, or damaged."""
        try:
            return read(self.path)
        except (OSError, ValueError, EOFError):
            return None

    def put(self, write: Callable[[pathlib.Path], Any]) -> None:
        """Keeps it; where nothing can be written, it is found out again next time."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.path.parent) as folder:
                draft = pathlib.Path(folder) / "draft"
                write(draft)
                draft.replace(self.path)
        except OSError:
            pass


def locate(starts: np.ndarray, i: int) -> tuple[int, int]:
    """(part, number within it) of example i, where part p begins with example starts[p]."""
    part = int(np.searchsorted(starts, i, side="right")) - 1
    return part, int(i - starts[part])
