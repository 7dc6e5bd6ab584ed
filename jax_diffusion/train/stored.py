"""Reading checkpoints: which there are, whether they are whole, what is in them.

A checkpoint is a folder checkpoints/STEP of orbax items: params and ema (so that sampling reads one of them), rest (the
optimizer and all else of a TrainState) and meta, a JSON with shape, type and checksum of every leaf. Orbax restores a
flipped byte without a word; so before anything is read the files are held against the checkpoint's manifest
(manifest.py), and after it the leaves against their checksums (sums.py).
"""

import json
import logging
import pathlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from jax_diffusion.errors import UserError
from jax_diffusion.sharding import path_name
from jax_diffusion.train import manifest, sums

T = TypeVar("T")


class Damaged(UserError):
    """A checkpoint that cannot be read, or is not what was saved."""

    def __init__(self, step: int, reason: str):
        super().__init__(
            f"checkpoint {step} is damaged: {reason}; use another one, without --checkpoint the newest that is whole"
        )
        self.reason = reason


def folder_of(workdir: str | pathlib.Path) -> pathlib.Path:
    return pathlib.Path(workdir).absolute() / "checkpoints"


def steps(folder: pathlib.Path) -> list[int]:
    """Of all checkpoints in `folder`, ascending. What orbax has not committed has another name."""
    return sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit() and p.is_dir())


def describe(items: Mapping[str, Any]) -> dict[str, Any]:
    """Shape, type and checksum of every leaf, for `meta`. Of several processes all have to call it."""
    out = {}
    for item, tree in items.items():
        of = sums.of_tree(tree)
        leaves = ((path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree))
        out[item] = {name: {"shape": list(x.shape), "dtype": str(x.dtype), "sum": of[name]} for name, x in leaves}
    return out


def read_meta(folder: pathlib.Path, step: int) -> dict[str, Any]:
    """Of a checkpoint: "step", "leaves" (`describe`; until version 0.1 "crc"). Raises Damaged."""
    path = folder / str(step) / "meta" / "metadata"
    try:
        meta = json.loads(path.read_bytes())
        if not isinstance(meta, dict) or not isinstance(meta.get("leaves", meta.get("crc")), dict):
            raise ValueError("it holds no leaves")
    except FileNotFoundError:
        raise Damaged(step, f"{path} is missing") from None
    except OSError as e:
        raise Damaged(step, f"{path} cannot be read: {e.strerror or e}") from None
    except ValueError as e:
        raise Damaged(step, f"{path} is damaged: {e}") from None
    return meta


def problem(folder: pathlib.Path, step: int, items: Sequence[str] | None = None, part=(0, 1)) -> str | None:
    """What is wrong with a checkpoint's files, as `manifest.problem`. Checkpoints of old versions have no manifest."""
    try:
        meta = read_meta(folder, step)
    except Damaged as e:
        return e.reason
    if "leaves" not in meta and not (folder / str(step) / manifest.NAME).exists():
        return None
    return manifest.problem(folder / str(step), items, part)


def read(folder: pathlib.Path, step: int, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The items of a checkpoint in the shapes and shardings of `wanted`, item -> abstract tree.

    Raises Damaged, or UserError where it is of another model.
    """
    meta = read_meta(folder, step)
    new = "leaves" in meta
    if new:
        _check_fits(step, meta["leaves"], wanted)
    handler = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
    try:
        args = {item: ocp.args.StandardRestore(tree) for item, tree in wanted.items()}
        out = handler.restore(folder / str(step), args=ocp.args.Composite(**args))
    except Exception as e:  # whatever a damaged file makes of the libraries that read it
        why = (str(e).strip() or type(e).__name__).splitlines()[0]
        if not new and isinstance(e, ValueError | KeyError):
            raise UserError(f"checkpoint {step} does not fit this config: {why}") from e
        raise Damaged(step, f"{folder / str(step)}: {why}") from e
    finally:
        handler.close()
    for item in wanted:
        if new:
            found, saved = sums.of_tree(out[item]), {k: v["sum"] for k, v in meta["leaves"][item].items()}
        else:
            found, saved = _crc(out[item]), meta["crc"][item]
        for name, value in found.items():
            if saved.get(name, value) != value:
                raise Damaged(step, f"{folder / str(step) / item}: {name} does not have the values that were saved")
    return {item: out[item] for item in wanted}


def _check_fits(step: int, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for item, tree in wanted.items():
        leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        there = {name: f"{v['dtype']} {v['shape']}" for name, v in saved.get(item, {}).items()}
        here = {name: f"{leaf.dtype} {list(leaf.shape)}" for name, leaf in leaves.items()}
        for name in (*here, *there):
            a, b = there.get(name, "missing"), here.get(name, "missing")
            if a != b:
                raise UserError(
                    f"checkpoint {step} does not fit this config, it is of another model: {item}/{name} is {a} in the "
                    f"checkpoint and {b} here; use another --workdir, or the config it was trained with"
                )


def _crc(tree: Any) -> dict[str, int]:
    """What old versions kept: path -> CRC32 of each leaf this process holds whole."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        path_name(path): zlib.crc32(np.ascontiguousarray(jax.device_get(leaf)).data)
        for path, leaf in leaves
        if leaf.is_fully_addressable
    }


class Found(NamedTuple):
    """See `newest`."""

    step: int | None
    value: Any
    broken: dict[int, str]  # newer checkpoints that are not whole -> why


def newest(folder: pathlib.Path, load: Callable[[int], T], items: Sequence[str] | None = None) -> Found:
    """`load(step)` of the newest checkpoint that is whole; a step of None where there is no checkpoint at all.

    items: whose files have to be whole (None: all).
    Of several processes each looks at its part of the files, and all decide alike. UserError where none is whole.
    """
    broken: dict[int, str] = {}
    while True:
        left = [step for step in steps(folder) if step not in broken]  # anew: a trainer may be saving, and deleting
        step = _first(max(left, default=-1))
        if step < 0:
            break
        why = _agreed(problem(folder, step, items, part=(jax.process_index(), jax.process_count())))
        if why is None:
            try:
                value = load(step)
            except Damaged as e:
                why = e.reason
            why = _agreed(why)
        if why is None:
            return Found(step, value, broken)
        broken[step] = why
    if broken:
        raise UserError(
            f"no checkpoint in {folder} is whole: {'; '.join(f'{k}: {v}' for k, v in broken.items())}. Nothing was "
            "changed; put a copy back, or use another --workdir"
        )
    return Found(None, None, {})


def _gather(row: np.ndarray) -> np.ndarray:
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(row))


def _first(step: int) -> int:
    """Process 0's."""
    return step if jax.process_count() == 1 else int(_gather(np.asarray(step, np.int32)).reshape(-1)[0])


def _agreed(reason: str | None, size: int = 512) -> str | None:
    """The first process's that has one."""
    if jax.process_count() == 1:
        return reason
    row = np.frombuffer((reason or "").encode()[:size].ljust(size, b"\0"), np.uint8)
    said = (bytes(r).rstrip(b"\0").decode(errors="ignore") for r in _gather(row).reshape(-1, size))
    return next(filter(None, said), None)


def restore_weights(workdir, abstract: Any, *, step: int | None = None, ema: bool = True) -> tuple[Any, int]:
    """The EMA (or raw) weights of a checkpoint and its step: of `step`, or of the newest that is whole.

    UserError where there is none, or `step` is damaged; a newer one that is damaged is a warning.
    """
    folder = folder_of(workdir)
    there = steps(folder)
    if not there:
        raise UserError(
            f"--workdir={workdir} has no checkpoint yet: train it with `jax-diffusion train --workdir={workdir}`"
        )
    if step is not None and step not in there:
        raise UserError(f"--checkpoint={step} is not in {workdir}: there are {', '.join(map(str, there))}")

    def load(step):
        if why := problem(folder, step, (_weights_item(folder, step, ema), "meta")):
            raise Damaged(step, why)
        return weights(folder, step, abstract, ema=ema)

    if step is not None:
        return load(step), step
    found = newest(folder, load, items=("meta",))
    for bad, why in found.broken.items():
        logging.getLogger(__name__).warning("checkpoint %d is damaged: %s; using %d", bad, why, found.step)
    return found.value, found.step  # type: ignore[return-value]  # None was refused


def _weights_item(folder: pathlib.Path, step: int, ema: bool) -> str:
    """Weights that came without an average are their own."""
    meta = read_meta(folder, step)
    return "ema" if ema and "ema" in (meta.get("leaves") or meta.get("crc") or ()) else "params"


def weights(folder: pathlib.Path, step: int, abstract: Any, *, ema: bool = True) -> Any:
    """The averaged or the raw weights of a checkpoint, in the shardings that `abstract` carries."""
    item = _weights_item(folder, step, ema)
    return read(folder, step, {item: abstract})[item]
