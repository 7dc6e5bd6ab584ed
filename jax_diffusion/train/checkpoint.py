"""Checkpoints of a training run: orbax, asynchronous, the newest few and the best one kept. Read by stored.py.

A checkpoint is written under another name and gets its own, `checkpoints/STEP`, when all of it and its manifest are on
the disk: a process that is killed at any moment leaves the checkpoints before, and perhaps a folder that the next start
removes. One that was damaged later is moved to checkpoints/broken, never deleted, and the one before is used.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from jax_diffusion.errors import UserError
from jax_diffusion.train import manifest, stored
from jax_diffusion.train.state import TrainState
from jax_diffusion.train.stored import restore_weights  # noqa: F401  what samplers read

T = TypeVar("T")
ITEMS = ("params", "ema", "rest")


def _items(state: TrainState) -> dict[str, Any]:
    rest = {"step": state.step, "opt_state": state.opt_state, "timesteps": state.timesteps}
    if state.faults:  # older checkpoints have no such leaves
        rest["faults"] = state.faults
    if state.averages:  # checkpoints of runs without them have no such leaves
        rest["averages"] = state.averages
    return {"params": state.params, "ema": state.ema, "rest": rest}


def only_weights(workdir: str | pathlib.Path) -> bool:
    """Whether all that a workdir holds is weights from elsewhere, with nothing trained on them yet."""
    folder = stored.folder_of(workdir)
    steps = stored.steps(folder)
    return bool(steps) and not any((folder / str(step) / "rest").is_dir() for step in steps)


class Checkpointer:
    """Saves and restores TrainStates under workdir/checkpoints. A context manager: leaving it waits.

    Whatever keeps a checkpoint from being saved is raised as a UserError: at once, at the next `save`, or by `wait`.
    """

    def __init__(self, workdir: str | pathlib.Path, keep: int = 2, log: Callable[[str], None] = print):
        self.folder, self.keep, self.log = stored.folder_of(workdir), keep, log
        self._manager: ocp.CheckpointManager | None = None
        self._saving: int | None = None  # what may not be on the disk yet
        self._here: int | None = None  # the step that was saved or restored last
        self._whole: set[int] = set()  # whose files have been looked at

    @property
    def manager(self) -> ocp.CheckpointManager:
        """Made when it is first needed: it reads what lies there, and removes what was never finished."""
        if self._manager is None:
            best = policies.BestN(get_metric_fn=lambda m: -m["val_loss"], n=1, keep_checkpoints_without_metrics=False)
            self._manager = ocp.CheckpointManager(
                self.folder,
                item_names=(*ITEMS, "meta"),
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(max(self.keep, 1)), best]),
                    create=True,
                    cleanup_tmp_directories=True,
                    async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
                ),
            )
        return self._manager

    def _seal(self) -> None:
        """Called, by process 0 alone, when a checkpoint is whole and has not got its name yet."""
        drafts = sorted(self.folder.glob(f"{self._saving}.orbax-checkpoint-tmp*"))
        # Where names cannot be changed at once, in buckets, it has its own and orbax's mark is still missing.
        manifest.write(drafts[-1] if drafts else self.folder / str(self._saving))

    def steps(self) -> list[int]:
        """Of all checkpoints here, ascending."""
        return stored.steps(self.folder)

    def latest(self) -> int | None:
        return max(self.steps(), default=None)

    def newest(self, load: Callable[[int], T]) -> T | None:
        """`load(step)` of the newest checkpoint that is whole; None where there is no checkpoint.

        Newer ones that are not are named and set aside. UserError, and nothing moved, where none is whole.
        """

        def checked(step):
            self._whole.add(step)
            return load(step)

        found = stored.newest(self.folder, checked)
        for step, why in found.broken.items():
            self._set_aside(step, f"checkpoint {step} is damaged: {why}")
        self._here = found.step
        return found.value

    def _set_aside(self, step: int, why: str) -> None:
        """Moves a checkpoint out of the way. Of several processes all have to call it."""
        target = self.folder / "broken" / f"{step}-{time.strftime('%Y%m%d-%H%M%S')}"
        if jax.process_index() == 0:
            number = 1
            while target.exists():
                number += 1
                target = target.with_name(f"{target.name.split('.')[0]}.{number}")
            target.parent.mkdir(exist_ok=True)
            (self.folder / str(step)).rename(target)
        self.log(f"{why}; moved to {target.relative_to(self.folder.parent)}")
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices(f"set aside {step}")
        if self._manager is not None:
            self._manager.reload()

    def save(self, state: TrainState, val_loss: float | None = None) -> None:
        """Copies the state to the host and returns; the writing goes on in the background."""
        step, items = int(state.step), _items(state)
        if step == self._here:
            return
        self.wait()
        # Orbax takes no step at or before one that is there, and says nothing.
        for other in (other for other in self.steps() if other >= step):
            self._set_aside(other, f"checkpoint {other} is of a run that was left for step {step}")
        self._save(step, items, {} if val_loss is None else {"metrics": {"val_loss": val_loss}})

    def save_weights(self, params: Any, ema: Any = None, step: int = 0) -> None:
        """Saves weights that no run of ours has trained (yet); without `ema` they are their own average."""
        self._save(step, {"params": params} | ({} if ema is None else {"ema": ema}), {})
        self.wait()

    def _save(self, step: int, items: dict[str, Any], options: dict[str, Any]) -> None:
        meta = {"step": step, "leaves": stored.describe(items)}
        args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        self._saving = step
        try:
            saved = self.manager.save(step, args=ocp.args.Composite(**args, meta=ocp.args.JsonSave(meta)), **options)
        except Exception as e:
            raise self._unsaved(e) from e
        if not saved:
            raise RuntimeError(f"orbax refused to save step {step}")
        self._here = step

    def holds_weights_alone(self, step: int) -> bool:
        """Whether checkpoint `step` was made by save_weights: a start, with no optimizer state."""
        return not (self.folder / str(step) / "rest").is_dir()

    def restore_weights(self, abstract: Any, step: int, *, ema: bool = True) -> Any:
        """The averaged weights of a step, or the raw ones, in the shardings that `abstract` carries."""
        return stored.weights(self.folder, step, abstract, ema=ema)

    def restore(self, abstract: TrainState, step: int | None = None) -> TrainState:
        """The state of a step (None: the newest) in the shardings that `abstract` carries.

        Raises stored.Damaged, or UserError where it is of another model.
        """
        self.wait()
        step = self.latest() if step is None else step
        assert step is not None, f"{self.folder} holds no checkpoint"
        if step not in self._whole and (why := stored.problem(self.folder, step)):
            raise stored.Damaged(step, why)
        leaves = stored.read_meta(self.folder, step).get("leaves", {}).get("rest", ())
        known = {k: v for k, v in abstract.faults.items() if f"faults/{k}" in leaves}
        out = stored.read(self.folder, step, _items(dataclasses.replace(abstract, faults=known)))
        rest, params, ema = out["rest"], out["params"], out["ema"]
        averages = tuple(rest.get("averages", ()))
        faults = _faults(abstract.faults, rest.get("faults", {}))
        self._here = step
        return TrainState(rest["step"], params, rest["opt_state"], ema, rest["timesteps"], averages, faults)

    def drop_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps, the newest first: those of a way that a rollback leaves."""
        self.wait()
        self._here = None
        for later in reversed(self.steps()):
            if later > step:
                self.manager.delete(later)

    def wait(self) -> None:
        """Returns when what was saved is on the disk."""
        if self._manager is not None:
            try:
                self._manager.wait_until_finished()
            except Exception as e:
                raise self._unsaved(e) from e

    def _unsaved(self, e: BaseException) -> UserError:
        cause = e
        while cause.__cause__ is not None:
            cause = cause.__cause__
        why = (getattr(cause, "strerror", None) or str(cause).strip() or type(cause).__name__).splitlines()[0]
        there = [step for step in self.steps() if step != self._saving]
        left = f"the newest one there is {there[-1]}" if there else "there is none yet"
        return UserError(
            f"checkpoint {self._saving} could not be saved in {self.folder}: {why}; {left}. Mend that (is the disk "
            "full?) and start the same command again"
        )

    def __enter__(self):
        return self

    def __exit__(self, kind, *exc):
        try:
            self.wait()
        except UserError as e:
            if kind is None:
                raise
            self.log(str(e))  # what went wrong first is raised
        finally:
            if self._manager is not None:
                self._manager.close()


def _faults(wanted: dict[str, Any], saved: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The saved counters; those that an older checkpoint had not heard of start at nought."""
    zero = {k: jax.device_put(np.zeros(v.shape, v.dtype), v.sharding) for k, v in wanted.items() if k not in saved}
    return {**zero, **saved}
