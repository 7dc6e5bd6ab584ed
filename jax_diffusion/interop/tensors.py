"""Files of named arrays as PyTorch people keep them: safetensors, whole or in shards, and torch's own.

safetensors are read with NumPy alone and one tensor at a time. Torch's pickles need torch and are opened with
weights_only=True: nothing in them is ever executed.
"""

import argparse
import hashlib
import json
import pathlib
import re
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jax_diffusion.errors import UserError
from jax_diffusion.io.tensors import Tensors, open_safetensors, save

__all__ = ["PICKLES", "Tensors", "open_file", "save"]

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def open_file(path: str | pathlib.Path) -> Tensors:
    """The tensors of one file or of a sharded index. UserError where it cannot be read or is damaged."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path} is no file: give a .safetensors, an index of shards, or one of {', '.join(PICKLES)}")
    _check_blob(path)
    if re.search(r"\.index(\.\w+)?\.json$", path.name):
        return _open_shards(path)
    if path.suffix == ".safetensors":
        return open_safetensors(path)
    if path.suffix in PICKLES:
        return _open_pickle(path)
    raise UserError(f"{path} is neither .safetensors nor one of {', '.join(PICKLES)}")


def _open_shards(path: pathlib.Path) -> Tensors:
    try:
        files = json.loads(path.read_text())["weight_map"]
        names = sorted(set(files.values()))
        odd = [n for n in names if pathlib.PurePath(n).name != n or not n.endswith((".safetensors", *PICKLES))]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise UserError(f"{path} is damaged or no index of shards: {type(error).__name__}: {_line(error)}") from None
    if odd or not names:
        raise UserError(f"{path} is damaged: its shards should be files beside it, not {_few(odd) or 'none'}")
    shards = {name: open_file(path.parent / name) for name in names}
    for name, shard in shards.items():
        listed = {tensor for tensor, file in files.items() if file == name}
        if lost := sorted(listed - shard.shapes.keys()):
            raise UserError(f"{path} lists tensors that {name} lacks: {_few(lost)}")
        if more := sorted(shard.shapes.keys() - listed):
            raise UserError(f"{path} does not list tensors that {name} holds: {_few(more)}")
    shapes = {name: shards[file].shapes[name] for name, file in files.items()}
    return Tensors(path, shapes, lambda name: shards[files[name]][name])


def _open_pickle(path: pathlib.Path) -> Tensors:
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path} is a file of PyTorch's, which needs torch to be read: `pip install torch`, or convert it "
            "to .safetensors where torch is installed"
        ) from None
    _check_archive(path)
    try:
        # Namespaces are the options that training scripts save beside the weights; they hold values and do nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        pairs = list(_flat(content, torch.Tensor))
    except Exception as error:  # whatever a damaged archive may raise
        raise UserError(
            f"{path} is damaged, or holds Python objects, which are never executed ({type(error).__name__}): "
            "save its state_dict() as .safetensors or with torch.save"
        ) from None
    found = dict(pairs)
    if not found:
        raise UserError(f"{path} holds no tensors")
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise UserError(
            f"{path} holds {next(n for n in names if names.count(n) > 1)} twice: in nested and in flat form"
        )

    def read(name: str) -> np.ndarray:
        tensor = found[name].detach()
        try:
            return tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
        except (TypeError, RuntimeError):
            said = f"{tensor.layout} {tensor.dtype}".replace("torch.", "")
            raise UserError(f"{path}: {name} is {said}: convert it to a dense float32 tensor") from None

    return Tensors(path, {name: tuple(t.shape) for name, t in found.items()}, read)


def _check_archive(path: pathlib.Path) -> None:
    """torch.save writes a CRC of each tensor, which torch.load does not look at."""
    if not zipfile.is_zipfile(path):
        return  # of PyTorch before 1.6, or no file of PyTorch's: torch.load will say
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except Exception as error:  # whatever a damaged archive may raise
        raise UserError(f"{path} is damaged: {type(error).__name__}: {_line(error)}") from None
    if broken:
        raise UserError(f"{path} is damaged: {broken} in it does not have the bytes that were saved")


def _flat(content: Any, leaf: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The tensors of nested dicts, their keys joined by dots."""
    if isinstance(content, leaf):
        yield prefix, content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from _flat(value, leaf, f"{prefix}.{key}" if prefix else str(key))


def _check_blob(path: pathlib.Path) -> None:
    """A hub's cache names large files by their SHA-256: free protection against damage."""
    name = path.resolve().name
    if path.is_symlink() and re.fullmatch("[0-9a-f]{64}", name):
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != name:
                raise UserError(f"{path} is damaged: its SHA-256 is not its name in the cache; download it again")


def _few(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
