"""Several sets trained on together, each with its share.

    --config.data.source=mixture
    --config.data.mixture="((0.7, {'source': 'folder', 'path': 'photos'}), (0.3, {'source': 'idx', 'path': 'mnist'}))"

The fields of a part are those of config.data; what it does not say, size and channels and the rest, is config.data's.
"""

import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from jax_diffusion.data.order import Mixed, Order, Shuffled, whole_weights
from jax_diffusion.data.source import Once, Source
from jax_diffusion.errors import UserError, choose

EXAMPLE = "--config.data.mixture=\"((0.7, {'source': 'folder', 'path': 'a'}), (0.3, {'source': 'idx', 'path': 'b'}))\""


class Mixture:
    """The examples of several sources, one after the other, trained on in shares by weight (order.Mixed).

    `rows` are the examples that count, all by default. Labels are shared where all parts have the same class names;
    else the classes of each part follow those of the one before.

    Raises:
      UserError: the parts differ in shape or type, or some have labels and others have none.
    """

    def __init__(self, parts: Sequence[Source], weights: Sequence[int], held_out: bool = False):
        self.parts, self.weights = tuple(parts), tuple(weights)
        sizes = [len(p) for p in self.parts]
        ends = np.cumsum([0, *sizes])
        self._ends = list(itertools.pairwise(ends))  # of each part: its examples are start..stop-1
        self._order = Mixed(tuple(sizes), self.weights)
        self._rows = self._order.once() if held_out else None
        self.name = " + ".join(f"{w / sum(weights):.4g} {p.name}" for w, p in zip(weights, parts, strict=True))
        first = self.parts[0]
        self.shape, self.dtype = first.shape, first.batch(np.zeros(1, np.int64))["image"].dtype
        for part in self.parts[1:]:
            dtype = part.batch(np.zeros(1, np.int64))["image"].dtype
            if tuple(part.shape) != tuple(first.shape) or dtype != self.dtype:
                raise UserError(
                    f"config.data.mixture: {first.name} is {_form(first.shape)} of {self.dtype}, {part.name} "
                    f"{_form(part.shape)} of {dtype}; set --config.data.size=64,64 and --config.data.channels=3"
                )
        self.ahead = max(p.ahead for p in self.parts)
        self._label_classes()

    def _label_classes(self) -> None:
        names = [p.class_names for p in self.parts]
        self.class_names: tuple[str, ...] = ()
        self.num_classes: int | None = None
        self._offsets = [0] * len(names)
        unlabelled = [p.name for p in self.parts if p.num_classes is None]
        if len(unlabelled) == len(names):
            return
        if unlabelled:
            raise UserError(
                f"config.data.mixture: {unlabelled[0]} has no labels, others have: set --config.data.labels=False"
            )
        if all(n == names[0] for n in names):
            self.class_names = names[0]
        else:
            self._offsets = list(np.cumsum([0, *(len(n) for n in names[:-1])]))
            self.class_names = tuple(n for part in names for n in part)
        self.num_classes = len(self.class_names)

    @property
    def skipped(self) -> tuple[str, ...]:
        return tuple(name for p in self.parts for name in p.skipped)

    @property
    def order(self) -> Order:
        """See Source.order."""
        return self._order if self._rows is None else Shuffled(len(self))

    def __len__(self) -> int:
        return int(self._ends[-1][1]) if self._rows is None else len(self._rows)

    def batches(self, tasks: Sequence[np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        """See Source.batches. Each part makes its own ahead."""
        streams = [p.batches(_Share(tasks, self._rows, *ends)) for p, ends in zip(self.parts, self._ends, strict=True)]
        try:
            for d in range(len(tasks)):
                yield self._merge(tasks[d], lambda j, _: next(streams[j]))
        finally:
            for stream in streams:
                if isinstance(stream, Generator):  # a map has nothing to close
                    stream.close()

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """See Source.batch."""
        return self._merge(indices, lambda j, mine: self.parts[j].batch(mine))

    def _merge(self, indices: np.ndarray, get: Callable[[int, np.ndarray], dict]) -> dict[str, np.ndarray]:
        """A batch from what get(j, numbers within part j) gives for each part."""
        rows = np.asarray(indices) if self._rows is None else self._rows[indices]
        out = {"image": np.empty((len(rows), *self.shape), self.dtype)}
        if self.num_classes:
            out["label"] = np.empty(len(rows), np.int32)
        for j, (start, stop) in enumerate(self._ends):
            mine = (start <= rows) & (rows < stop)
            found = get(j, rows[mine] - start)
            out["image"][mine] = found["image"]
            if self.num_classes:
                out["label"][mine] = found["label"] + self._offsets[j]
        return out


class _Share(Sequence[np.ndarray]):
    """The part of each task that belongs to examples start..stop-1, which are a source of their own."""

    def __init__(self, tasks: Sequence[np.ndarray], rows: np.ndarray | None, start: int, stop: int):
        self.tasks, self.rows, self.start, self.stop = tasks, rows, start, stop

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, d: int) -> np.ndarray:  # type: ignore[override]  # no slices
        rows = self.tasks[d] if self.rows is None else self.rows[self.tasks[d]]
        return rows[(self.start <= rows) & (rows < self.stop)] - self.start


def _form(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def load(cfg: Any, split: str, once: Once) -> Source:
    """The sets of cfg.mixture, ((weight, fields), ...). Eval is what they held out, in the same shares.

    Raises:
      UserError: no parts, wrong fields or weights, or whatever is wrong with a part.
    """
    from jax_diffusion.data import open_source

    parts = [_part(cfg, number, item) for number, item in enumerate(cfg.mixture)]
    if not parts:
        raise UserError(f"config.data.mixture=() names no sets: {EXAMPLE}")
    sources = [open_source(fields, split, once) for _, fields in parts]
    return Mixture(sources, whole_weights([weight for weight, _ in parts]), held_out=split == "eval")


def _part(cfg: Any, number: int, item: Any) -> tuple[float, SimpleNamespace]:
    """(weight, data config) of one part."""
    try:
        weight, fields = item
        fields = dict(fields)
        right = not isinstance(weight, bool) and 0 < weight < float("inf")
    except (TypeError, ValueError):
        right = False
    if not right:
        raise UserError(f"config.data.mixture: part {number} is {item!r}, not a weight > 0 and its fields: {EXAMPLE}")
    base = dict(vars(cfg) if isinstance(cfg, SimpleNamespace) else cfg)
    base |= {"mixture": (), "path": "", "eval_path": "", "name": ""}  # where a set lies is each one's own
    for field in fields:
        choose(f"config.data.mixture: field of part {number}", field, base)
    if fields.get("source", "mixture") == "mixture":
        raise UserError(f"config.data.mixture: part {number} has no source of its own: {EXAMPLE}")
    return float(weight), SimpleNamespace(**base | fields)
