"""What a run says of itself: losses by time, norms by block, the last update, memory."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_diffusion import models, schedules, sharding, timesteps
from jax_diffusion.train import metrics, program
from jax_diffusion.train.report import Meter
from jax_diffusion.train.writers import is_clock

NAMES = metrics.bucket_names()


@pytest.mark.parametrize("name", ["linear", "flow", "cosine"])
def test_losses_are_sorted_by_the_share_of_time(name):
    schedule = schedules.make(name)
    u = np.random.default_rng(0).uniform(size=64).astype(np.float32)
    losses = np.random.default_rng(1).uniform(size=64).astype(np.float32)
    t = timesteps.from_unit(schedule, jnp.asarray(u))
    total, count = metrics.loss_by_time(schedule, t, jnp.asarray(losses))
    which = np.minimum((u * metrics.BUCKETS).astype(int), metrics.BUCKETS - 1)
    np.testing.assert_array_equal(count, np.bincount(which, minlength=metrics.BUCKETS))
    np.testing.assert_allclose(total, np.bincount(which, losses, minlength=metrics.BUCKETS), rtol=1e-5)


def test_noise_levels_of_any_size_are_sorted_by_their_logarithm():
    schedule = schedules.make("edm")
    t = jnp.asarray([0.0001, 0.002, 0.1, 1.0, 79.0, 80.0, 1e6])
    _, count = metrics.loss_by_time(schedule, t, jnp.ones(7))
    np.testing.assert_array_equal(count, [2, 1, 1, 3])


def period(n, good=None, time=0, loss=1.0, skipped=0):
    """A dispatch of n steps of 8 samples, all of one bucket of time, after so many skipped steps."""
    good = np.ones(n, bool) if good is None else np.asarray(good)
    by_time = np.zeros((n, 2, metrics.BUCKETS), np.float32)
    by_time[:, :, time] = 8 * loss, 8
    return n, {
        "loss": np.where(good, loss, np.nan),
        "grad_norm": np.full(n, 2.0),
        "by_time": np.where(good[:, None, None], by_time, np.nan),
        "skipped": skipped + np.cumsum(~good),
        "spikes": np.zeros(n, int),
        "in_a_row": np.where(good, 0, 1),
    }


def test_skipped_steps_are_in_no_mean():
    said = metrics.summarise([period(2, [True, False]), period(3, time=2, loss=4.0, skipped=1)])
    assert said.scalars == {"loss": pytest.approx((1 + 3 * 4) / 4), "grad_norm": 2, NAMES[0]: 1, NAMES[2]: 4,
                            "skipped": 1, "spikes": 0}  # fmt: skip
    np.testing.assert_array_equal(said.in_a_row, [0, 1, 0, 0, 0])
    nothing = metrics.summarise([period(2, [False, False])])
    assert nothing.scalars == {"skipped": 2, "spikes": 0}


def test_one_step_and_several_in_a_dispatch_are_summed_alike():
    n, together = period(3, [True, False, True])
    alone = [(1, {k: v[i] for k, v in together.items()}) for i in range(n)]
    assert metrics.summarise(alone).scalars == metrics.summarise([(n, together)]).scalars


def test_a_period_of_skipped_steps_alone_still_has_a_line():
    meter = Meter(total_steps=10, batch_size=8, flops_per_step=1.0)
    meter.add(*period(2, [False, False]))
    (record,) = meter.flush(2, {})
    assert "all skipped" in record.line and "loss" not in record.scalars and "nan" not in record.line
    json.loads(json.dumps(record.scalars, allow_nan=False))


@pytest.fixture(scope="module")
def toy(tiny):
    config = tiny("toy2d", "optim.weight_decay=0.1", "optim.schedule=constant", "optim.warmup=3")
    built = program.build(config, (2,), 2, sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1]))
    now, _ = built.create(jax.random.key(0))
    return built, now, jax.jit(built.train_step())


def norm(tree):
    return np.sqrt(sum(np.sum(np.square(np.asarray(x, np.float64))) for x in jax.tree.leaves(tree)))


def test_vitals_are_what_they_say(toy):
    built, now, run = toy
    vitals = built.vitals()
    for i in range(3):
        rng = np.random.default_rng(i)
        batch = {"image": rng.normal(size=(64, 2)).astype(np.float32), "label": rng.integers(0, 2, 64).astype(np.int32)}
        before, (now, _) = now, run(now, batch)
        said = {k: float(v) for k, v in vitals(now).items()}
        moved = jax.tree.map(lambda a, b: a - b, now.params, before.params)
        assert said["update_ratio"] == pytest.approx(norm(moved) / norm(now.params), rel=1e-2)
        assert said["learning_rate"] == pytest.approx(float(built.learning_rate(i)))
    apart = jax.tree.map(lambda a, b: a - b, now.ema, now.params)
    assert said["ema_distance"] == pytest.approx(norm(apart) / norm(now.params), rel=1e-5)
    assert said["param_norm"] == pytest.approx(norm(now.params), rel=1e-5)
    blocks = {k.removeprefix("param_norm/"): v for k, v in said.items() if k.startswith("param_norm/")}
    assert blocks["blocks/1"] == pytest.approx(norm(now.params["blocks"]["1"]), rel=1e-5)
    assert blocks["stem"] == pytest.approx(norm(now.params["stem"]), rel=1e-5)
    assert np.sqrt(np.sum(np.square(list(blocks.values())))) == pytest.approx(norm(now.params), rel=1e-5)


def test_after_a_skipped_step_the_last_update_is_still_the_last(toy):
    built, start, run = toy
    bad = {"image": np.full((64, 2), np.nan, np.float32), "label": np.zeros(64, np.int32)}
    now, _ = run(start, bad)
    said = {k: float(v) for k, v in built.vitals()(now).items()}
    assert said["update_ratio"] == 0 and np.isfinite(list(said.values())).all()


def test_the_layers_of_a_stack_are_reported_in_groups():
    network = models.make("dit", (8, 8, 1), num_classes=0, size="", width=16, depth=6, heads=2, patch=4)
    params = network.init(jax.random.key(0))
    squares = metrics._squares(params)
    layers = [k for k in squares if k.startswith("stack/")]
    assert layers == ["stack/0-1", "stack/2-3", "stack/4-4", "stack/5-5"]
    wanted = norm(jax.tree.map(lambda x: x[2:4], params["stack"]))
    assert np.sqrt(float(squares["stack/2-3"])) == pytest.approx(wanted, rel=1e-5)
    assert np.sqrt(sum(map(float, squares.values()))) == pytest.approx(norm(params), rel=1e-5)


def test_memory_is_the_devices_or_named_as_the_hosts():
    said = metrics.memory(jax.devices())
    assert list(said) == ["memory/host_peak"] and 1 << 20 < said["memory/host_peak"] < 1 << 44

    class Device:
        process_index = 0

        def __init__(self, peak):
            self.peak = peak

        def memory_stats(self):
            return {"peak_bytes_in_use": self.peak, "bytes_in_use": 1}

    assert metrics.memory([Device(5), Device(7)]) == {"memory/device_peak": 7.0}


def test_what_depends_on_the_clock_is_told_apart(run):
    lines = [json.loads(line) for line in (run.workdir / "metrics.jsonl").read_text().splitlines()]
    training = [r for r in lines if "loss" in r]
    assert training and not any(is_clock(k) for r in training for k in r)
    last = training[-1]
    assert {"grad_norm", "param_norm", "ema_distance", "update_ratio", "skipped", "rollbacks", *NAMES} <= last.keys()
    assert 0 < last["update_ratio"] < 0.1 and 0 < last["ema_distance"] < 1
    assert sum(k.startswith("param_norm/") for k in last) > 5
    speed = [json.loads(line) for line in (run.workdir / "speed.jsonl").read_text().splitlines()]
    assert all(r["memory/host_peak"] > 0 for r in speed if "images_per_s" in r)
