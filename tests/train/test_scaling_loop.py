"""The host in the training loop: it compiles nothing after the first period and waits for nothing that it queued."""

import collections
import pathlib
import re
import threading
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_diffusion import runtime
from jax_diffusion.train import loop, report


def test_nothing_is_compiled_after_the_first_round(tiny, tmp_path):
    """Steps, validation, samples and checkpoints come three times, and the programs of the first time serve all."""
    fields = ["train.steps=30", "train.log_every=4", "train.eval_every=10", "train.sample_every=10",
              "train.checkpoint_every=10", "sampling.num=3", "sampling.batch_size=2"]  # fmt: skip
    counts = {}

    def log(line):
        counts[re.match(r"\w*(\s+\d+)?", line)[0]] = runtime.compiled().programs

    before = runtime.compiled().programs
    outcome = loop.train(tiny("toy2d", *fields), tmp_path, log=log)
    assert outcome.finished and len(list((tmp_path / "samples").iterdir())) == 3
    # The first period ends with the first pause.
    assert before < counts["step  4"] == counts["step  8"] < counts["step 12"]
    assert counts["step 12"] == counts["step 20"] == counts["step 24"] == counts["step 30"] == counts["done"]


class Pending:
    """A number on the device that notes whether the host asks for it too early."""

    def __init__(self, queue, step, value):
        self.queue, self.step, self.value = queue, step, value

    def block_until_ready(self):
        # Its step should not be the last one queued: then the devices would have nothing to do while the host waits.
        if self.queue.steps == self.step + 1 and not self.queue.pausing:
            self.queue.early.append(self.step)
        return self

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.block_until_ready().value, dtype)

    def __float__(self):
        return float(np.asarray(self))


class Queue:
    """Counts the steps that the training loop has queued; their metrics are Pending."""

    def __init__(self, monkeypatch, wrap_step):
        self.steps, self.pausing, self.early = 0, False, []
        flush, queue = report.Meter.flush, self

        def counted(run):
            def step(state, batch):
                state, metrics = run(state, batch)
                queue.steps += 1
                return state, {k: Pending(queue, queue.steps - 1, v) for k, v in metrics.items()}

            return step

        def flushed(meter, *a, **k):
            queue.pausing = True
            try:
                return flush(meter, *a, **k)
            finally:
                queue.pausing = False

        wrap_step(counted)
        monkeypatch.setattr(report.Meter, "flush", flushed)


FIELDS = ["train.steps=12", "train.log_every=3", "train.eval_every=6", "train.sample_every=0",
          "train.checkpoint_every=12", "optim.schedule=cosine"]  # fmt: skip


def test_no_step_waits_for_the_one_before(tiny, tmp_path, monkeypatch, wrap_step):
    queue = Queue(monkeypatch, wrap_step)
    loop.train(tiny("toy2d", *FIELDS), tmp_path, log=lambda line: None)
    assert queue.steps == 12 and queue.early == []


def test_a_step_that_is_waited_for_would_be_noticed(tiny, tmp_path, monkeypatch, wrap_step):
    queue, add = Queue(monkeypatch, wrap_step), report.Meter.add

    def waits(meter, steps, metrics):
        float(metrics["loss"])
        add(meter, steps, metrics)

    monkeypatch.setattr(report.Meter, "add", waits)
    loop.train(tiny("toy2d", *FIELDS), tmp_path, log=lambda line: None)
    assert queue.early == list(range(12))


def test_the_host_fetches_numbers_once_a_period_and_in_pauses_alone(tiny, tmp_path, monkeypatch):
    """Every array that is read on the host while training runs, and where it is asked for."""
    array, main = type(jnp.zeros(())), threading.get_ident()
    value, sites, steps = array._value, {}, []

    def site():
        ours = [f for f in traceback.extract_stack() if "jax_diffusion" in pathlib.Path(f.filename).parts]
        return f"{pathlib.Path(ours[-1].filename).name}:{ours[-1].name}" if ours else "elsewhere"

    def watched(self):
        if steps and threading.get_ident() == main:
            sites.setdefault(site(), set()).add(steps[-1])
        return value.__get__(self)

    add = report.Meter.add

    def counted(meter, n, metrics):
        steps.append(steps[-1] + n if steps else n)
        add(meter, n, metrics)

    monkeypatch.setattr(report.Meter, "add", counted)
    monkeypatch.setattr(array, "_value", property(watched))
    loop.train(tiny("toy2d", *FIELDS), tmp_path, log=lambda line: None)
    sites = {name: at for name, at in sites.items() if at != {12}}  # the last pause, where all is saved
    assert sites.pop("report.py:_finish") <= {3, 6, 9, 12}  # at 3 nothing is old enough
    assert sites.pop("observe.py:__call__") == {6, 12} and sites == {}


def traced(config, workdir, first, last):
    """What the profiler saw of the steps `first` to `last` - 1: when the host queued each, when the device began and
    ended it; in seconds, on one clock."""
    loop.train(config, workdir, profile=f"{first}:{last}", log=lambda line: None)
    (path,) = (workdir / "profile").rglob("*.xplane.pb")
    queued, runs = [], collections.defaultdict(list)
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats) if line.name.startswith("tf_XLA") or event.name == "train" else {}
                if "step_num" in stats:
                    queued.append(event.start_ns / 1e9)
                if stats.get("hlo_module") == "jit_step":
                    runs[stats["run_id"]].append((event.start_ns / 1e9, event.end_ns / 1e9))
    ran = sorted((min(begin for begin, _ in ops), max(end for _, end in ops)) for ops in runs.values())
    assert len(queued) == len(ran) == last - first
    return np.sort(queued), np.array(ran)


@pytest.mark.parametrize("waiting", [False, True])
def test_the_trace_shows_the_next_step_queued_before_a_step_ends(tiny, tmp_path, monkeypatch, waiting):
    """Logging every third step all the while; and the same of a loop that looks at each loss."""
    add = report.Meter.add

    def waits(meter, steps, metrics):
        float(metrics["loss"])
        add(meter, steps, metrics)

    if waiting:
        monkeypatch.setattr(report.Meter, "add", waits)
    fields = ["model.width=256", "train.batch_size=1024", "train.steps=30", "train.log_every=3", "train.eval_every=0",
              "train.checkpoint_every=30"]  # fmt: skip
    queued, ran = traced(tiny("toy2d", *fields), tmp_path, 12, 24)
    ahead = queued[1:] < ran[:-1, 1]
    # On a busy machine the host may come late now and then.
    assert not ahead.any() if waiting else ahead.mean() > 0.5, (queued, ran)


@pytest.mark.parametrize("k", [1, 4])
def test_the_loop_moves_nothing_that_it_does_not_say(tiny, tmp_path, monkeypatch, k):
    """Between devices and host only by device_put and device_get: a Python number given to a program would be an
    implicit transfer."""
    watch, guard = loop.Watchdog.__enter__, []

    def enter(watchdog):  # where the steps begin
        guard.append(jax.transfer_guard("disallow"))
        guard[0].__enter__()
        return watch(watchdog)

    monkeypatch.setattr(loop.Watchdog, "__enter__", enter)
    config = tiny("toy2d", *FIELDS, "train.eval_every=0", f"train.steps_per_dispatch={k}")
    try:
        outcome = loop.train(config, tmp_path, log=lambda line: None)
    finally:
        guard[0].__exit__(None, None, None)
    assert outcome.finished
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match=r"[Dd]isallowed"):
        jax.jit(lambda x: x + 1)(3)  # the guard works
