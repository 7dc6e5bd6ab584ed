"""Seconds of the soak (soak_script.py): threads, files and arrays on the devices after one span and after the next."""

import importlib.util
import pathlib
import time

import numpy as np

SPEC = importlib.util.spec_from_file_location("soak_script", pathlib.Path(__file__).with_name("soak_script.py"))
soak = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(soak)

EVERY, SPANS = 10, 24  # steps between checkpoints, validations and grids of samples, all at once; how often


def test_nothing_is_left_behind_by_a_checkpoint_a_validation_and_a_grid(tiny, tmp_path):
    fields = [f"train.{name}_every={EVERY}" for name in ("eval", "sample", "checkpoint")]
    config = tiny("toy2d", f"train.steps={EVERY * SPANS}", "train.log_every=5", "optim.schedule=constant", *fields)

    def saved(line):
        """Waits for the save in the background, which holds threads, files and sockets: no reading is of one."""
        ends = time.monotonic() + 30
        while any(tmp_path.glob("checkpoints/*.orbax-checkpoint-tmp")) and time.monotonic() < ends:
            time.sleep(0.01)

    readings = soak.watch(config, tmp_path, every=0, report=saved)
    assert readings[-1].step == EVERY * SPANS

    def least(name, first, last):
        return min(getattr(r, name) for r in readings if first * EVERY < r.step <= last * EVERY)

    # The least of a span, since the end of a save's thread may come after. One kept a time would be ten.
    for name, slack in (("threads", 4), ("files", 2), ("arrays", 0), ("array_mib", 0)):
        assert least(name, 14, SPANS) <= least(name, 4, 14) + slack, name


def reading(seconds, rss, threads=10):
    return soak.Reading(seconds, int(seconds), rss, threads, 12, 100, 1.0)


def test_the_verdict_finds_a_leak_and_forgives_a_peak():
    flat = [reading(t, 500 + 30 * (t % 20 == 3), 10 + (t % 7 == 0)) for t in range(200)]
    assert soak.verdict(flat)[0]
    assert not soak.verdict([reading(t, 500 + 0.5 * t) for t in range(200)])[0]
    assert not soak.verdict([reading(t, 500, 10 + t // 50) for t in range(200)])[0]
    lost = [reading(t, 500 + 150 * soak.LOST * t) for t in range(400)]  # by tensorstore, 150 arrays a step
    assert soak.verdict(lost, saved=150)[0] and not soak.verdict(lost)[0]
    assert not soak.verdict([reading(t, 500 + 600 * soak.LOST * t) for t in range(400)], saved=150)[0]


def test_the_slope_is_not_bent_by_peaks():
    x = np.arange(50.0)
    y = 3 * x + np.where(x % 10 == 0, 1e4, 0)
    assert abs(soak.slope(x, y) - 3) < 1e-6
