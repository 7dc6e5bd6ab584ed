"""What every data source is: a numbered set of examples, gathered a batch at a time.

One Python call a batch, not one an image: below a few hundred kilobytes an image, per-item Python
costs more than decoding does.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from jax_diffusion.data.order import Order, Shuffled
from jax_diffusion.errors import UserError

HOLDOUT_SEED = 20_240_229  # Fixed for ever: another value would move eval images into old runs' training sets.


class Source(Protocol):
    """Examples 0..len-1 of one split; `batch` is pure and may be called from any thread."""

    name: str
    shape: tuple[int, ...]  # (H, W, C) of one image, (D,) of one point
    num_classes: int | None  # None: no labels
    class_names: tuple[str, ...]  # by label; () where there are none
    ahead: int  # batches that `batches` may hold in other processes, made or in the making

    @property
    def skipped(self) -> tuple[str, ...]:
        """Names of the corrupt files left out."""
        ...

    @property
    def order(self) -> Order:
        """In what order they are trained on."""
        ...

    def __len__(self) -> int: ...

    def batches(self, tasks: Sequence[np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        """batch(indices) for each of the tasks in turn, maybe made ahead by other processes, which end with the
        iterator. Tasks can be pickled and number as many as order.Tasks does."""
        ...

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Gathers examples.

        Args:
          indices: integers [B] in [0, len).

        Returns:
          {"image": uint8 [B, H, W, C] in 0..255, or float32 [B, ...] kept as it came,
          "label": int32 [B], only where num_classes is not None}.
        """
        ...


class Pieces:
    """Several arrays [N_i, ...] of one kind, one after the other, mostly mapped from files; floats become float32."""

    def __init__(self, pieces: Sequence[np.ndarray]):
        self.pieces = tuple(map(np.asarray, pieces))
        self.starts = np.cumsum([0, *map(len, pieces)])
        self.dtype = np.dtype(np.float32 if pieces[0].dtype.kind == "f" else pieces[0].dtype)
        self.shape = (int(self.starts[-1]), *pieces[0].shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Rows [B, ...]."""
        indices = np.asarray(indices)
        out = np.empty((len(indices), *self.shape[1:]), self.dtype)
        part = np.searchsorted(self.starts, indices, side="right") - 1
        for p in np.unique(part):
            mine = part == p
            out[mine] = np.take(self.pieces[p], indices[mine] - self.starts[p], axis=0)
        return out


class ArraySource:
    """A set in memory (or memory-mapped): one array [N, ...], or Pieces of one, gathered by batch."""

    ahead = 0

    def __init__(
        self,
        images: np.ndarray | Pieces,  # [N, ...], uint8 or float32
        labels: np.ndarray | None = None,  # integers [N], or None
        *,
        name: str = "array",
        num_classes: int | None = None,  # default: len(class_names), else max(labels) + 1
        class_names: Sequence[str] = (),  # by label
        skipped: Sequence[str] = (),  # names of corrupt files
        rows: np.ndarray | None = None,  # the examples that count, all by default; saves a copy of the rest
    ):
        self.images = images
        self.labels = None
        self.rows = rows
        self.name = name
        self.shape = tuple(images.shape[1:])
        self.num_classes = None
        self.class_names: tuple[str, ...] = ()
        self.skipped = tuple(skipped)
        if labels is None:
            return
        self.labels = np.asarray(labels, np.int32)
        if self.labels.shape != (len(images),):
            raise UserError(f"{name}: {len(images)} images but labels of shape {self.labels.shape}; one per image")
        top = int(self.labels.max(initial=-1)) + 1
        self.num_classes = num_classes or len(class_names) or top
        if self.labels.min(initial=0) < 0 or top > self.num_classes:
            raise UserError(f"{name}: labels must lie in 0..{self.num_classes - 1}, one is outside")
        self.class_names = tuple(class_names) or tuple(str(i) for i in range(self.num_classes))

    @property
    def order(self) -> Order:
        """See Source.order."""
        return Shuffled(len(self))

    def __len__(self) -> int:
        return len(self.images) if self.rows is None else len(self.rows)

    def batches(self, tasks: Iterable[np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        """See Source.batches."""
        return map(self.batch, tasks)

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """See Source.batch."""
        if self.rows is not None:
            indices = self.rows[indices]
        pieces = isinstance(self.images, Pieces)
        images = self.images.take(indices) if pieces else np.take(np.asarray(self.images), indices, axis=0)
        out = {"image": images}
        if self.labels is not None:
            out["label"] = np.take(self.labels, indices)
        return out


class Once:
    """Calls each function once with the same arguments: what the splits of a set share is opened by the first."""

    def __init__(self):
        self._made: dict[Hashable, Any] = {}

    def __call__(self, function: Callable, *args: Hashable) -> Any:
        key = function, args
        if key not in self._made:
            self._made[key] = function(*args)
        return self._made[key]


def split_indices(n: int, holdout: float, split: str, name: str) -> np.ndarray:
    """Indices (sorted, [M]) of `split` where a source of n examples has no test set of its own.

    Train and eval are disjoint and together are 0..n-1; which is which depends on n and holdout only.

    Raises:
      UserError: holdout outside [0, 1), or one of the two sets would be empty.
    """
    if not 0 <= holdout < 1:
        raise UserError(f"config.data.holdout={holdout} is not a share: give a number in [0, 1)")
    if holdout == 0:
        if split == "train":
            return np.arange(n)
        raise UserError(
            f"config.data.holdout=0 leaves nothing to evaluate on: {name} has no test set of its own; "
            "set --config.data.holdout=0.1 (and train again: the held-out images must be unseen)"
        )
    n_eval = max(1, round(n * holdout))
    if n_eval >= n:
        raise UserError(f"config.data.holdout={holdout} leaves no training image of the {n} in {name}; lower it")
    order = np.random.default_rng(HOLDOUT_SEED).permutation(n)
    return np.sort(order[:n_eval] if split == "eval" else order[n_eval:])
