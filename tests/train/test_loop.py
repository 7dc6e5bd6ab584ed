"""What a run leaves behind: numbers, pictures, facts; and how it takes Ctrl-C."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from jax_diffusion.cli.main import main
from jax_diffusion.train import report
from jax_diffusion.train.events import due
from jax_diffusion.train.interrupt import Interrupt
from jax_diffusion.train.report import Meter, count, duration
from jax_diffusion.train.setup import eval_indices


def metrics(workdir, name="metrics"):
    return [json.loads(line) for line in (workdir / f"{name}.jsonl").read_text().splitlines()]


def test_metrics_are_one_json_object_a_line(run):
    records = metrics(run.workdir)
    training = [r for r in records if "loss" in r]
    assert [r["step"] for r in training] == [10, 20, 30, 40, 50, 60]
    assert [r["step"] for r in records if "val_loss" in r] == [30, 60]
    for r in training:
        assert all(math.isfinite(r[k]) and r[k] >= 0 for k in ("loss", "grad_norm", "learning_rate"))


def test_what_depends_on_the_clock_has_its_own_file(run):
    records = metrics(run.workdir, "speed")
    assert [r["step"] for r in records] == [10, 20, 30, 40, 50, 60]
    clock = {key for r in records for key in r} - {"step"}
    assert clock >= {"time", "images_per_s", "flops_per_s", "input_wait"}
    assert not any(clock & r.keys() for r in metrics(run.workdir))
    for r in records:
        assert r["images_per_s"] > 0 and r["time"] > 1e9 and 0 <= r["input_wait"] <= 1
    # FLOP/s over img/s is the work of one image: the same in every period.
    work = [r["flops_per_s"] / r["images_per_s"] for r in records]
    np.testing.assert_allclose(work, work[0], rtol=1e-9)
    assert work[0] > 1e5


def test_the_loss_falls(run):
    records = metrics(run.workdir)
    losses = [r["loss"] for r in records if "loss" in r]
    assert losses[-1] < 0.8 * losses[0]
    assert records[-1].get("val_loss", run.outcome.val_loss) == run.outcome.val_loss


def test_the_log_says_the_rate_and_the_time_left(run):
    steps = [line for line in run.lines if line.startswith("step ") and "loss" in line and "ETA" in line]
    assert len(steps) == 6 and all("img/s" in line and "FLOP/s" in line for line in steps)
    assert run.lines[-1].startswith("done: 60 steps in ")
    assert not any("\n" in line for line in run.lines)


def test_tensorboard_reads_the_events(run):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(run.workdir / "tensorboard")).Reload()
    assert {"loss", "val_loss", "images_per_s"} <= set(events.Tags()["scalars"])
    scalars = {e.step: e.value for e in events.Scalars("loss")}
    for record in metrics(run.workdir):
        if "loss" in record:
            assert scalars[record["step"]] == pytest.approx(record["loss"], rel=1e-6)
    assert [e.step for e in events.Images("samples")] == [60]


def test_samples_are_drawn(run):
    (path,) = (run.workdir / "samples").glob("*.png")
    assert path.name == "step_00000060.png"
    # 20 tiles of 8x8, six times enlarged, in columns by class, two pixels apart.
    assert Image.open(path).size == (10 * 50 + 2, 2 * 50 + 2)


def test_facts_are_written(run):
    facts = json.loads((run.workdir / "dataset.json").read_text())
    assert facts["shape"] == [8, 8, 1] and facts["class_names"] == [str(i) for i in range(10)]
    assert facts["train_examples"] == 1617


@pytest.mark.parametrize("steps, every", [(1, 5), (3, 5), (7, 5), (12, 5)])
def test_due_once_a_period_however_long_a_dispatch(steps, every):
    times = [now for now in range(steps, 120, steps) if due(every, now - steps, now)]
    assert times == [now for now in range(steps, 120, steps) if now % every < steps]
    assert not due(0, 0, 100)


def said(loss):
    """What steps of these losses say of themselves."""
    n = len(loss)
    return n, {"loss": np.float32(loss), "in_a_row": np.zeros(n, int), "by_time": np.ones((n, 2, 4))}


def test_a_meter_weighs_dispatches_by_their_steps():
    meter = Meter(total_steps=10, batch_size=4, flops_per_step=1e3)
    meter.add(*said([1.0, 1.0, 1.0]))
    meter.add(*said([5.0]))
    assert meter.roll(4, {}) == []  # one period late
    meter.add(*said([6.0, 8.0]))
    (first,) = meter.roll(6, {})
    (second,) = meter.flush(6, {"of": np.float32(3)})
    assert (first.step, first.scalars["loss"]) == (4, 2.0) and (second.step, second.scalars["loss"]) == (6, 7.0)
    assert first.scalars["flops_per_s"] == pytest.approx(first.scalars["images_per_s"] / 4 * 1e3)


class Queued:
    """Of a device that takes a second a step, one after the other: done at `seconds`, for whom the host's clock
    stands still until it waits."""

    def __init__(self, clock, seconds, value):
        self.clock, self.seconds, self.value = clock, seconds, value

    def block_until_ready(self):
        self.clock[0] = max(self.clock[0], self.seconds)
        return self

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.block_until_ready().value, dtype)


@pytest.mark.parametrize("every", [1, 2, 3, 7])
def test_a_rate_is_the_devices_and_not_the_hosts(every, monkeypatch):
    """Steps are queued in a millisecond each: the first periods after a pause, when there is none to wait for yet, are
    no faster than the others."""
    clock = [0.0]
    monkeypatch.setattr(report, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    meter, records = Meter(total_steps=42, batch_size=4, flops_per_step=1.0), []
    for start in (0, 21):  # and a pause of 100 seconds
        meter.restart_clock()
        began = clock[0]
        for i in range(1, 22):
            clock[0] += 1e-3
            steps, metrics = said([1.0])
            meter.add(steps, {k: Queued(clock, began + i, v) for k, v in metrics.items()})
            if i % every == 0:
                records += (meter.flush if i == 21 else meter.roll)(start + i, {})
        records += meter.flush(start + 21, {})
        clock[0] += 100
    assert [r.step for r in records] == [s for s in range(1, 43) if (s % 21 or 21) % every == 0 or s % 21 == 0]
    np.testing.assert_allclose([r.scalars["images_per_s"] for r in records], 4, rtol=1e-6)


def test_a_host_that_comes_late_says_no_rate_that_nobody_reached(monkeypatch):
    """Two steps of a second each, both done when it looks."""
    clock = [0.0]
    monkeypatch.setattr(report, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    meter = Meter(total_steps=2, batch_size=4, flops_per_step=1.0)
    ready = {k: jax.device_put(v) for k, v in said([1.0])[1].items()}
    meter.add(1, ready)
    assert meter.roll(1, {}) == []
    meter.add(1, ready)
    clock[0] = 2.0
    rates = [r.scalars["images_per_s"] for r in meter.flush(2, {})]
    assert rates == [2, 4]  # the first, it saw, took no longer than both; the second is a mean


def test_a_meter_forgets_what_a_rollback_takes_back():
    meter = Meter(total_steps=10, batch_size=4, flops_per_step=1e3)
    for step in (1, 2):
        meter.add(*said([1.0]))
        meter.roll(step, {})
    meter.add(*said([1.0]))
    meter.forget()
    assert meter.flush(3, {}) == []


def test_numbers_as_people_write_them():
    assert [count(1234567, "FLOP"), count(999), count(2e9, "img/s")] == ["1.23 MFLOP", "999", "2 Gimg/s"]
    assert [duration(s) for s in (5.4, 65, 3723)] == ["0:05", "1:05", "1:02:03"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_a_question(number):
    before = signal.getsignal(number)
    with Interrupt() as interrupt:
        assert not interrupt.requested
        os.kill(os.getpid(), number)
        deadline = time.monotonic() + 5
        while not interrupt.requested and time.monotonic() < deadline:
            time.sleep(0.01)
        assert interrupt.requested == number.name
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_breaks_off():
    with pytest.raises(KeyboardInterrupt), Interrupt():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)


def test_ctrl_c_saves_and_says_how_to_resume(arguments, tmp_path, capsys):
    fields = ["train.steps=1000000", "train.eval_every=0", "train.checkpoint_every=1000000"]
    command = [sys.executable, "-m", "jax_diffusion.cli.main", "train", "--config=toy2d", f"--workdir={tmp_path}"]
    process = subprocess.Popen(
        [*command, *arguments("toy2d", *fields)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        for line in process.stdout:
            if line.startswith("step "):
                break
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, err
    last = out.splitlines()[-1]
    assert last.startswith("stopped (SIGINT) and saved at step ") and "Traceback" not in err
    assert last.endswith(f"resume: jax-diffusion train --workdir={tmp_path}")
    (saved,) = (p for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    step = int(saved.name)
    assert f"saved at step {step:,};" in last

    assert main(["train", f"--workdir={tmp_path}", f"--stop_at={step + 10}"]) == 0
    out = capsys.readouterr().out
    assert f"at step {step:,} of 1,000,000" in out and f"saved at step {step + 10:,};" in out


@pytest.mark.parametrize("n, size, batches", [(1000, 16, 4), (10, 4, 3), (7, 16, 1), (64, 8, 8), (5, 5, 1)])
def test_validation_takes_its_examples_from_the_whole_set(n, size, batches):
    """Of a set sorted by class, examples of every class; all before any twice."""
    indices = eval_indices(n, size, batches)
    assert indices.shape == (batches, size) and indices.min() == 0 and indices.max() < n
    counts = np.bincount(indices.ravel(), minlength=n)
    assert counts.max() <= -(-batches * size // n)
    quarters = np.bincount(indices.ravel() * 4 // n, minlength=4)
    assert n < 16 or quarters.min() * 2 >= quarters.max()
