"""Going back to the last good checkpoint, with other data ahead, where steps are skipped again and again.

The decision is a function of the checkpoint and the steps after it, however late the host hears of them:

  * it is due as soon as any step was the max_bad_steps-th skipped in a row, whether or not the row has ended since;
  * the run goes back to the newest *scheduled* checkpoint (of train.checkpoint_every, not of an interrupt) with a good
    step after it, or with bad data after it. Nothing is saved amid a row, and metrics are read before anything is
    saved, so every checkpoint that lies behind a row was made in a run that has gone back for it;
  * data and keys go on where the row ended: shift grows by as many steps as are taken back.

So nothing needs to be written down: a run that is killed after it has gone back, and before it has saved again, starts
from the same checkpoint, meets the same row, and goes back the same way. What is decided on is in the metrics, one
logging period late, alike on all processes: no step waits.
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from jax_diffusion.errors import UserError
from jax_diffusion.train import diagnosis, events
from jax_diffusion.train.checkpoint import Checkpointer
from jax_diffusion.train.report import Record
from jax_diffusion.train.setup import Setup
from jax_diffusion.train.state import TrainState
from jax_diffusion.train.writers import MetricWriter


class Rollback:
    """`look` at every record; where `due`, `rollback(state, now)` is the state to go on from."""

    def __init__(
        self,
        s: Setup,
        checkpoints: Checkpointer,
        writer: MetricWriter,
        start: Callable[[int | None], TrainState],  # the state of a checkpoint, or (None) the initial one
        log: Callable[[str], None],
    ):
        self.s, self.checkpoints, self.writer, self.start, self.log = s, checkpoints, writer, start, log
        self.in_a_row = 0  # skipped up to the last step heard of
        self._trip: int | None = None  # steps done when the row was too long

    @property
    def due(self) -> bool:
        return self._trip is not None

    def look(self, record: Record) -> None:
        """Takes note of a period's skipped steps."""
        self.in_a_row, most = int(record.in_a_row[-1]), self.s.config.train.max_bad_steps
        bad = int(np.count_nonzero(record.in_a_row))
        if bad:
            self.log(f"warning: step {record.step:,}: {bad} of the last {len(record.in_a_row)} steps were skipped: "
                     "their loss or gradient was not finite, or a spike")  # fmt: skip
        if most and self._trip is None and (over := np.flatnonzero(record.in_a_row >= most)).size:
            self._trip = record.step - len(record.in_a_row) + int(over[0]) + 1

    def may_save(self, now: int) -> bool:
        """Whether a checkpoint after `now` steps may count: not amid a row, unless the run is done."""
        if not self.in_a_row or now == self.s.config.train.steps:
            return True
        self.log(f"step {now:,}: not saved, since the last {self.in_a_row} steps were skipped; "
                 f"a resumed run goes on from {self._newest()}")  # fmt: skip
        return False

    def _newest(self) -> str:
        return f"step {self.checkpoints.steps()[-1]:,}" if self.checkpoints.steps() else "the start"

    def __call__(self, state: TrainState, now: int) -> TrainState:
        """Deletes `state` and the checkpoints after the one it goes back to. Raises UserError where it may not."""
        t, trip = self.s.config.train, self._trip
        assert trip is not None  # `due` says when to call this
        first = trip - t.max_bad_steps  # steps done before the row
        faults = {k: int(v) for k, v in jax.device_get(state.faults).items()}
        found = diagnosis.diagnose(self.s, state, first, faults["shift"])
        found |= {
            "exact": faults["in_a_row"] >= now - first,
            "in_a_row": t.max_bad_steps,
            "rollbacks": faults["rollbacks"],
        }
        path = diagnosis.write(self.s.workdir, found)
        row = f"{t.max_bad_steps} steps in a row from step {first + 1:,} on were skipped"
        said = f"{row}; {diagnosis.sentence(found)} ({path})"
        if faults["rollbacks"] >= t.max_rollbacks:
            raise UserError(
                f"training has failed after {faults['rollbacks']} rollbacks: {said}; look at the data named there, or "
                "start again with a lower --config.optim.learning_rate, or resume with "
                f"--config.train.max_rollbacks={2 * t.max_rollbacks + 1}"
            )
        self.checkpoints.wait()
        target = self._target(first, found["first"]["what"] == "input")
        jax.tree.map(lambda x: x.delete(), state)  # there may be no room for two
        self.checkpoints.drop_after(-1 if target is None else target)
        # Of what is left the newest is the target, unless it turns out damaged.
        newest = self.checkpoints.newest(self.start)
        state = self.start(None) if newest is None else newest
        back = int(state.step)
        self.writer.rewind(back)
        new = {"shift": faults["shift"] + trip - back, "rollbacks": faults["rollbacks"] + 1, "in_a_row": 0}
        like = state.faults["shift"]
        placed = {k: jax.device_put(np.asarray(v, like.dtype), state.faults[k].sharding) for k, v in new.items()}
        self.log(f"warning: {said}: going back to step {back:,} and on with other data, "
                 f"{faults['rollbacks'] + 1} of {t.max_rollbacks} rollbacks")  # fmt: skip
        self._trip, self.in_a_row = None, 0
        return dataclasses.replace(state, faults={**state.faults, **placed})

    def _target(self, first: int, data: bool) -> int | None:
        """The checkpoint to go back to, for a row that begins after `first` steps; None is the start.

        data: it is the data that is not finite. Else, where the row began at once, it may be the checkpoint itself.
        """
        t = self.s.config.train
        here = [step for step in self.checkpoints.steps() if step <= first]
        scheduled = [n for n in here if events.due(t.checkpoint_every, n - t.steps_per_dispatch, n)]
        for steps in (scheduled, here):
            if good := [n for n in steps if n < first + data]:
                return good[-1]
        return here[-1] if here else None
