"""Files of named arrays: safetensors, read one array at a time, with a CRC of each where we have written them.

The library of that name is imported where it is used: training does without it.
"""

import json
import pathlib
import zlib
from collections.abc import Callable, Iterator, Mapping

import ml_dtypes  # noqa: F401  gives NumPy bfloat16
import numpy as np

from jax_diffusion.errors import UserError
from jax_diffusion.io.whole import whole

CRC = "crc32"  # in the metadata of the files written here


class Tensors(Mapping[str, np.ndarray]):
    """name -> array, read when asked for; `shapes` without reading; `path` for messages."""

    def __init__(
        self, path: pathlib.Path, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], np.ndarray]
    ) -> None:
        self.path, self.shapes, self._read = path, dict(shapes), read

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.shapes:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def under(self, prefix: str) -> "Tensors":
        """Those whose names begin with `prefix`, without it."""
        shapes = {name.removeprefix(prefix): s for name, s in self.shapes.items() if name.startswith(prefix)}
        return Tensors(self.path, shapes, lambda name: self._read(prefix + name))

    def renamed(self, rename: Callable[[str], str]) -> "Tensors":
        """The same under other names (of older versions of a library). UserError where two become one."""
        names: dict[str, str] = {}
        for name in self.shapes:
            new = rename(name)
            if new in names:
                raise UserError(f"{self.path} holds {new} twice: as {names[new]} and as {name}")
            names[new] = name
        return Tensors(self.path, {new: self.shapes[old] for new, old in names.items()}, lambda n: self._read(names[n]))


def open_safetensors(path: pathlib.Path) -> Tensors:
    """The tensors of one file. UserError where it is damaged."""
    from safetensors import SafetensorError, safe_open

    def damaged(what: object) -> UserError:
        return UserError(f"{path} is damaged or no safetensors file: {' '.join(str(what).split())}")

    try:
        file = safe_open(path, framework="np")
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        crc = json.loads((file.metadata() or {}).get(CRC, "null"))
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(error) from None
    # Of all tensors or, in other people's files, of none.
    if crc is not None and (not isinstance(crc, dict) or crc.keys() != shapes.keys()):
        raise damaged(f"its {CRC} is not of its tensors")

    def read(name: str) -> np.ndarray:
        try:
            array = file.get_tensor(name)
        except (SafetensorError, OSError, ValueError) as error:
            raise damaged(error) from None
        except (TypeError, AttributeError):  # what safetensors makes of a type that NumPy lacks
            dtype = file.get_slice(name).get_dtype()
            raise UserError(f"{path}: {name} is of type {dtype}: convert it to F32, F16 or BF16") from None
        if crc is not None and crc[name] != _crc(array):
            raise UserError(f"{path} is damaged: {name} does not have the bytes that were saved")
        return array

    return Tensors(path, shapes, read)


def _crc(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).view(np.uint8))  # type: ignore[arg-type]  # an array is a buffer


def save(path: str | pathlib.Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None):
    """Writes a .safetensors file, whole or not at all, with a CRC of each tensor in its metadata."""
    from safetensors.numpy import save_file

    tensors = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    crc = json.dumps({name: _crc(array) for name, array in tensors.items()})
    with whole(path) as draft:
        save_file(tensors, draft, {"format": "pt", **(metadata or {}), CRC: crc})
