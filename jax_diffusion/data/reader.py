"""Encoded images by number: read, decoded, and the corrupt ones remembered. Goes to worker processes as it is."""

import logging
import threading
from typing import Any, Protocol

import numpy as np

from jax_diffusion.data.images import Format, decode
from jax_diffusion.errors import UserError

log = logging.getLogger("jax_diffusion.data")
TINY = 1024  # bytes of a file below which decoding is all Python: one thread does 13,500/s, two 12,200/s


class Encoded(Protocol):
    """Encoded images 0..len-1; `read` may be called from many threads. Can be pickled."""

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """What to call image i when it is corrupt."""
        ...

    def read(self, i: int) -> tuple[bytes, int | None]:
        """The file's bytes and its label."""
        ...


class Subset:
    """Some of the images of another Encoded."""

    def __init__(self, items: Encoded, indices: np.ndarray):
        self.items, self.indices = items, indices

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, i: int) -> str:
        return self.items.name(int(self.indices[i]))

    def read(self, i: int) -> tuple[bytes, int | None]:
        return self.items.read(int(self.indices[i]))


class Reader:
    """Reads and decodes one image; remembers which were corrupt. `shape` is that of the first readable.

    With `classes` > 0 an image whose label is none of 0..classes-1 counts as corrupt.

    Raises:
      UserError: not one image is readable; when called, that they differ in size or colour and none was asked for.
    """

    def __init__(self, items: Encoded, fmt: Format, name: str, classes: int = 0):
        self.items = items
        self.fmt = fmt
        self.source_name = name
        self.classes = classes
        self.bad: dict[int, str] = {}
        self.lock = threading.Lock()
        self.shape: tuple[int, ...] | None = None
        for i in range(len(items)):
            found = self(i)
            if found:
                self.tiny = len(items.read(i)[0]) < TINY
                self.shape = found[0].shape
                self.first = items.name(i)
                if self.shape[2] == 3:
                    # As found, but grey among colour becomes colour; colour among grey is refused, see below.
                    self.fmt = fmt._replace(channels=3)
                return
        first = f" (the first is {items.name(0)})" if len(items) else ""
        raise UserError(f"config.data.path: none of the {len(items)} images in {name} can be decoded{first}")

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self.lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.items)

    @property
    def skipped(self) -> tuple[str, ...]:
        """Names of the corrupt images met so far, in their order."""
        with self.lock:
            return tuple(name for _, name in sorted(self.bad.items()))

    def __call__(self, i: int) -> tuple[np.ndarray, int | None] | None:
        """Image i as (uint8 [H, W, C], label, None without classes), or None where it is corrupt."""
        if i in self.bad:
            return None
        try:
            data, label = self.items.read(i)
            if self.classes and (label is None or not 0 <= label < self.classes):
                raise ValueError(f"label {label}")
            image = decode(data, self.fmt)
        except UserError:
            raise
        except Exception:  # Pillow raises a dozen types on damaged files; each means the same here.
            self.mark(i)
            return None
        if self.shape is not None and image.shape != self.shape:
            self._refuse(i, image.shape)
        return image, label if self.classes else None

    def mark(self, i: int) -> bool:
        """Remembers that image i is corrupt; whether that is news."""
        with self.lock:
            news = i not in self.bad
            self.bad[i] = self.items.name(i)
        return news

    def readable(self, i: int) -> tuple[np.ndarray, int | None]:
        """Image i, or the next readable one in its place, with that one's label: always the same one."""
        n = len(self)
        if not -n <= i < n:
            raise IndexError(f"image {i} of {n} in {self.source_name}")
        for k in range(n):
            found = self((i + k) % n)
            if found:
                return found
        raise UserError(f"config.data.path: no image in {self.source_name} can be decoded any more")

    def empty(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Room for n images and labels: uint8 [n, H, W, C] and int32 [n] of -1."""
        assert self.shape is not None  # the first readable image has said it
        return np.empty((n, *self.shape), np.uint8), np.full(n, -1, np.int32)

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The images of a batch, read and decoded one after the other; see Source.batch."""
        images, labels = self.empty(len(indices))
        for j, i in enumerate(indices):
            images[j], label = self.readable(int(i))
            labels[j] = -1 if label is None else label
        return self.named(images, labels)

    def named(self, images: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
        """A batch of them, with labels where there are classes."""
        return {"image": images} | ({"label": labels} if self.classes else {})

    def _refuse(self, i: int, shape: tuple[int, ...]) -> None:
        assert self.shape is not None
        a, b = f"{self.first} is {_describe(self.shape)}", f"{self.items.name(i)} is {_describe(shape)}"
        if shape[:2] != self.shape[:2]:
            raise UserError(
                f"config.data.size=() keeps the images' own size, but in {self.source_name} sizes differ: "
                f"{a}, {b}; set --config.data.size=64,64"
            )
        raise UserError(
            f"config.data.channels=0 keeps the channels as found, but {self.source_name} has both: {a}, {b}; "
            "set --config.data.channels=3 or 1"
        )


def _describe(shape: tuple[int, ...]) -> str:
    return f"{shape[0]}x{shape[1]} {'grey' if shape[2] == 1 else 'colour'}"
