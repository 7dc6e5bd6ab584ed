"""Traces of a few training steps, for TensorBoard and Perfetto (jax.profiler)."""

import pathlib
from collections.abc import Callable

import jax

from jax_diffusion.errors import UserError


def parse(text: str) -> tuple[int, int]:
    """ "10:15" -> (10, 15)."""
    start, colon, stop = text.partition(":")
    if not (colon and start.isdecimal() and stop.isdecimal()):
        raise UserError(f"--profile={text}: write it as START:STOP in steps, for instance --profile=10:15")
    if int(start) >= int(stop):
        raise UserError(f"--profile={text}: STOP must be greater than START, for instance {start}:{int(start) + 5}")
    return int(start), int(stop)


def step(number: int) -> jax.profiler.StepTraceAnnotation:
    """Names what the host does under it "train", step `number`. Costs next to nothing where nothing is traced."""
    return jax.profiler.StepTraceAnnotation("train", step_num=number)


class Profile:
    """Traces the steps START to STOP - 1 of a run that goes from `first` to `last`, counted from 0 as in Python.

    START is moved to the end of its dispatch and STOP likewise. Used in a `with`, which ends a trace that an
    interrupt has cut short. window: "START:STOP"; None traces nothing.
    """

    def __init__(self, window: str | None, first: int, last: int, folder: pathlib.Path, log: Callable[[str], None]):
        self.last, self.folder, self.log = last, folder, log
        self.since: int | None = None
        self.window = None if window is None else parse(window)
        if self.window is not None and not first <= self.window[0] < self.window[1] <= last:
            raise UserError(f"--profile={window}: this run goes from step {first} to {last}; choose among those")
        self.active = jax.process_index() == 0

    def due(self, now: int) -> bool:
        """Whether `turn` has something to do after `now` steps."""
        if self.window is None:
            return False
        return self.window[0] <= now < self.last if self.since is None else now >= self.window[1]

    def turn(self, now: int) -> None:
        """Starts or ends the trace, if it is due. The devices should be idle, or the trace begins with other steps."""
        if not self.due(now):
            return
        if self.since is None:
            self.since = now
            if self.active:
                jax.profiler.start_trace(self.folder)
        else:
            self._end(now)

    def _end(self, now: int | None) -> None:
        since, self.since, self.window = self.since, None, None
        if not self.active:
            return
        jax.profiler.stop_trace()
        (newest,) = sorted(self.folder.glob("plugins/profile/*"))[-1:] or [self.folder]
        steps = f"steps {since} to {now - 1}" if now else f"the steps from {since} until it was interrupted"
        self.log(f"profile of {steps} in {newest}: open the .trace.json.gz at ui.perfetto.dev, or "
                 f"tensorboard --logdir={self.folder}")  # fmt: skip

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_) -> None:
        if self.since is not None:
            self._end(None)
        elif self.window is not None:
            self.log(f"no profile was written: no dispatch began from step {self.window[0]} on")
