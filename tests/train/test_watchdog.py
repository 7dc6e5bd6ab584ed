"""The watchdog says which of the two stands still, and where; it lets everything else take its time."""

import threading

import numpy as np
import pytest

from jax_diffusion.data import ArraySource
from jax_diffusion.train import loop, observe, watchdog
from jax_diffusion.train.watchdog import Watchdog

QUICK = 0.05  # seconds


class Lines(list):
    """A log that opens a gate when a line of it contains all the words."""

    def __init__(self, *words):
        super().__init__()
        self.words, self.gate = words, threading.Event()

    def __call__(self, line):
        self.append(line)
        if all(word in line for word in self.words):
            self.gate.set()

    def wait(self):
        assert self.gate.wait(timeout=120), f"{self.words} was never logged: {list(self)}"


def someone_waits_for_a_disk(gate):
    gate.wait(timeout=120)


@pytest.mark.parametrize("what, word", [("input", "its batch"), ("step", "the devices")])
def test_it_says_what_is_waited_for_and_where(what, word):
    log = Lines("someone_waits_for_a_disk")
    helper = threading.Thread(target=someone_waits_for_a_disk, args=(log.gate,), name="batches")
    with Watchdog(QUICK, log) as dog, dog.watching(what, 1234):
        if what == "input":
            helper.start()
            log.wait()
        else:
            someone_waits_for_a_disk(log.gate)
    assert log.gate.is_set()
    (said, *_) = [line for line in log if "has waited" in line]
    assert said.startswith("warning: step 1,234 has waited") and word in said
    assert any(f"the thread {'batches' if what == 'input' else 'MainThread'!r} is at:" in line for line in log)
    assert log[-1].startswith("step 1,234: goes on after")
    assert not any("\n" in line for line in log)


def test_a_maker_of_batches_that_has_ended_is_said():
    log = Lines("has ended")
    with Watchdog(QUICK, log) as dog, dog.watching("input", 1):
        log.wait()


class Clock:
    """time.monotonic and the wait between two looks, without time: every look is a second later."""

    def __init__(self, seconds):
        self.now, self.last = 0, seconds

    def monotonic(self):
        return self.now

    def wait(self, timeout):
        self.now += 1
        return self.now > self.last


def looks(monkeypatch, seconds, patience, *, seen, busy=lambda now: True):
    """When a watchdog of `patience` reports, of `seconds` looks."""
    clock, at = Clock(seconds), []
    monkeypatch.setattr(watchdog.time, "monotonic", clock.monotonic)
    dog = Watchdog(patience, lambda line: at.append(clock.now) if "has waited" in line else None)
    dog._ended = clock
    dog._seen = set(seen)
    with dog.watching("step", 1):
        dog._watch()
    return at


def test_reports_come_ever_more_rarely(monkeypatch):
    assert looks(monkeypatch, 100, 4, seen=["step"]) == [4, 8, 16, 32, 64]


def test_the_first_step_is_given_time(monkeypatch):
    assert looks(monkeypatch, 100, 4, seen=["input"]) == [20, 40, 80]


def test_what_is_not_watched_may_take_as_long_as_it_likes(monkeypatch):
    clock, lines = Clock(1000), []
    monkeypatch.setattr(watchdog.time, "monotonic", clock.monotonic)
    dog = Watchdog(4, lines.append)
    dog._ended = clock
    for what in ("input", "step"):
        with dog.watching(what, 1):
            pass
    dog._watch()
    assert clock.now > 1000 and lines == []


def test_zero_starts_no_thread():
    before = threading.active_count()
    with Watchdog(0, print) as dog, dog.watching("step", 1):
        assert threading.active_count() == before


@pytest.fixture
def config(tiny, tmp_path):
    path = tmp_path / "points.npy"
    np.save(path, np.random.default_rng(0).normal(size=(640, 2)).astype(np.float32))
    return tiny("toy2d", "data.source=numpy", f"data.path={path}", "data.labels=False", "train.steps=8", "train.keep=1",
                "train.eval_every=4", "train.checkpoint_every=8", f"train.stall_seconds={QUICK}")  # fmt: skip


def test_a_source_that_blocks_is_found_in_training(config, tmp_path, monkeypatch):
    log, batch, calls = Lines("a_disk_that_hangs"), ArraySource.batch, []

    def a_disk_that_hangs(source, indices):
        if threading.current_thread().name == "batches":
            calls.append(len(indices))
            if len(calls) == 4:
                log.wait()
        return batch(source, indices)

    monkeypatch.setattr(ArraySource, "batch", a_disk_that_hangs)
    config.data.on_device = "never"
    outcome = loop.train(config, tmp_path / "run", log=log)
    assert outcome.finished
    assert any("has waited" in line and "its batch" in line for line in log)


def test_a_step_that_blocks_is_found_and_validation_may_take_long(config, tmp_path, monkeypatch, wrap_step):
    log = Lines("a_device_that_hangs")
    config.train.stall_seconds = 0.5

    def hanging(run):
        steps = []

        def a_device_that_hangs(state, batch):
            steps.append(len(steps))
            if len(steps) == 6:
                log.wait()
            return run(state, batch)

        return a_device_that_hangs

    validate, slept = observe.Validator.__call__, threading.Event()

    def slow(self, ema):
        slept.wait(timeout=2)  # four times what a step may take
        return validate(self, ema)

    wrap_step(hanging)
    monkeypatch.setattr(observe.Validator, "__call__", slow)
    outcome = loop.train(config, tmp_path / "run", log=log)
    assert outcome.finished
    waits = [line for line in log if "has waited" in line]
    assert waits and all("step 5 has waited" in line and "the devices" in line for line in waits)
