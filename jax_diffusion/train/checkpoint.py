"""Checkpoints: orbax, asynchronous, the newest few and the best one kept, every leaf checked by CRC.

Orbax restores a flipped byte without a word, so a CRC of every leaf is saved with the weights and compared
after restoring. Weights, EMA and the rest are separate items: sampling reads one of them.
"""

import pathlib
import zlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from jax_diffusion.errors import UserError
from jax_diffusion.sharding import path_name
from jax_diffusion.train.state import TrainState

ITEMS = ("params", "ema", "rest")


def _folder(workdir: str | pathlib.Path) -> pathlib.Path:
    return pathlib.Path(workdir).absolute() / "checkpoints"


def _items(state: TrainState) -> dict[str, Any]:
    rest = {"step": state.step, "opt_state": state.opt_state, "timesteps": state.timesteps}
    if state.averages:  # checkpoints of runs without them have no such leaves
        rest["averages"] = state.averages
    return {"params": state.params, "ema": state.ema, "rest": rest}


def _crc(tree: Any) -> dict[str, int]:
    """path -> CRC32 of each leaf this process holds whole."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        path_name(path): zlib.crc32(np.ascontiguousarray(jax.device_get(leaf)).data)
        for path, leaf in leaves
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable
    }


def _check(tree: Any, saved: dict[str, int], item: str, step: int) -> None:
    for name, crc in _crc(tree).items():
        if saved.get(name, crc) != crc:
            raise UserError(
                f"checkpoint {step} is corrupt: {item}/{name} does not have the bytes that were saved; "
                "delete that checkpoint's folder and resume from an older one"
            )


def only_weights(workdir: str | pathlib.Path) -> bool:
    """Whether all that a workdir holds is weights from elsewhere, with nothing trained on them yet."""
    steps = [path for path in _folder(workdir).glob("*") if path.name.isdigit()]
    return bool(steps) and not any((path / "rest").is_dir() for path in steps)


class Checkpointer:
    """Saves and restores TrainStates under workdir/checkpoints. A context manager: leaving it waits."""

    def __init__(self, workdir: str | pathlib.Path, keep: int = 2):
        best = policies.BestN(get_metric_fn=lambda m: -m["val_loss"], n=1, keep_checkpoints_without_metrics=False)
        self.folder = _folder(workdir)
        self.manager = ocp.CheckpointManager(
            self.folder,
            item_names=(*ITEMS, "meta"),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(max(keep, 1)), best]),
                create=True,
                cleanup_tmp_directories=True,
            ),
        )

    def latest(self) -> int | None:
        return self.manager.latest_step()

    def save(self, state: TrainState, val_loss: float | None = None) -> None:
        """Copies the state to the host and returns; the writing goes on in the background."""
        step, items = int(state.step), _items(state)
        if step in self.manager.all_steps():
            return
        meta = {"step": step, "crc": {name: _crc(tree) for name, tree in items.items()}}
        saved = self.manager.save(
            step,
            args=ocp.args.Composite(
                **{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
                meta=ocp.args.JsonSave(meta),
            ),
            metrics=None if val_loss is None else {"val_loss": val_loss},
        )
        if not saved:
            raise RuntimeError(f"orbax refused to save step {step}")

    def save_weights(self, params: Any, ema: Any = None, step: int = 0) -> None:
        """Saves weights that no run of ours has trained (yet); without `ema` they are their own average."""
        items = {"params": params} | ({} if ema is None else {"ema": ema})
        meta = {"step": step, "crc": {name: _crc(tree) for name, tree in items.items()}}
        args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        self.manager.save(step, args=ocp.args.Composite(**args, meta=ocp.args.JsonSave(meta)))
        self.wait()

    def holds_weights_alone(self, step: int) -> bool:
        """Whether checkpoint `step` was made by save_weights: a start, with no optimizer state."""
        return not (self.folder / str(step) / "rest").is_dir()

    def restore_weights(self, abstract: Any, step: int, *, ema: bool = True) -> Any:
        """The averaged weights of a step, or the raw ones, in the shardings that `abstract` carries."""
        return _weights(self.manager, self.folder, step, abstract, ema)

    def restore(self, abstract: TrainState, step: int | None = None) -> TrainState:
        """The state of a step (None: the newest) in the shardings that `abstract` carries."""
        step = self.latest() if step is None else step
        items = _items(abstract)
        args = {name: ocp.args.StandardRestore(tree) for name, tree in items.items()}
        try:
            out = self.manager.restore(step, args=ocp.args.Composite(**args, meta=ocp.args.JsonRestore()))
        except (ValueError, KeyError) as e:
            raise UserError(f"checkpoint {step} does not fit this config: {str(e).splitlines()[0]}") from e
        for name in ITEMS:
            _check(out[name], out["meta"]["crc"][name], name, step)
        rest = out["rest"]
        averages = tuple(rest.get("averages", ()))
        return TrainState(rest["step"], out["params"], rest["opt_state"], out["ema"], rest["timesteps"], averages)

    def wait(self) -> None:
        self.manager.wait_until_finished()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.wait()
        self.manager.close()


def _weights(manager: ocp.CheckpointManager, folder: pathlib.Path, step: int, abstract: Any, ema: bool) -> Any:
    """The average or the raw weights; weights that came without an average are their own."""
    item = "ema" if ema and (folder / str(step) / "ema").is_dir() else "params"
    args = {item: ocp.args.StandardRestore(abstract), "meta": ocp.args.JsonRestore()}
    out = manager.restore(step, args=ocp.args.Composite(**args))
    _check(out[item], out["meta"]["crc"][item], item, step)
    return out[item]


def restore_weights(workdir, abstract: Any, *, step: int | None = None, ema: bool = True) -> tuple[Any, int]:
    """The EMA (or raw) weights of a checkpoint and its step. UserError where there is none."""
    folder = _folder(workdir)
    steps = []
    if folder.is_dir():
        manager = ocp.CheckpointManager(
            folder, item_names=(*ITEMS, "meta"), options=ocp.CheckpointManagerOptions(read_only=True)
        )
        steps = sorted(manager.all_steps())
    if not steps:
        raise UserError(
            f"--workdir={workdir} has no checkpoint yet: train it with `jax-diffusion train --workdir={workdir}`"
        )
    if step is not None and step not in steps:
        raise UserError(f"--checkpoint={step} is not in {workdir}: there are {', '.join(map(str, steps))}")
    step = steps[-1] if step is None else step
    weights = _weights(manager, folder, step, abstract, ema)
    manager.close()
    return weights, step
