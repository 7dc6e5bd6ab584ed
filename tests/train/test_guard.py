"""Steps that must not count are skipped within the compiled step, and nothing else changes."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_diffusion import experiment, process, schedules, sharding, timesteps
from jax_diffusion.models import Network
from jax_diffusion.train import checkpoint, guard, optim, state, step

BAD = (0, 3, 4)  # steps with a NaN in their batch, of STEPS
STEPS = 8


def points(i, bad=False, batch=16):
    rng = np.random.default_rng(i)
    image = rng.normal(size=(batch, 2)).astype(np.float32)
    if bad:
        image[5, 1] = np.nan
    return {"image": jnp.asarray(image), "label": jnp.asarray(rng.integers(0, 2, batch), jnp.int32)}


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def learned(s):
    """All of a state but what counts."""
    return s.params, s.opt_state, s.ema, s.timesteps, s.averages


@pytest.fixture(scope="module")
def trainer(tiny):
    def make(k=0, **options):
        fields = ["optim.schedule=constant", "process.timesteps=importance", "process.timesteps.bins=4"]
        config = tiny("toy2d", *fields)
        parts = experiment.build(config, (2,), 2)
        optimizer, _ = optim.make(config.optim, 100)
        profiles = (0.1,)
        init = state.make_init(parts.network, optimizer, parts.times, parts.process, len(profiles))
        mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
        start, shardings = state.create(init, jax.random.key(0), mesh)
        one = step.make_train_step(
            parts.network, parts.process, parts.times, optimizer, seed=0, ema_profiles=profiles, **options
        )
        run = step.compile_step(step.several(one) if k else one, shardings, mesh, leading=int(k > 0))
        return SimpleNamespace(start=start, run=run)

    return make


def copy(tree):
    return jax.tree.map(jnp.copy, tree)


def stacked(batches):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_optimizer_never_sees_a_bad_batch(trainer, accumulate):
    """Bit for bit the run in which those steps only count, in parameters, moments, averages and time sampler."""
    t = trainer(accumulate=accumulate, label_dropout=0.1)
    now, other, in_a_row = copy(t.start), copy(t.start), []
    for i in range(STEPS):
        now, metrics = t.run(now, points(i, i in BAD))
        in_a_row.append(int(metrics["in_a_row"]))
        assert np.isfinite(float(metrics["loss"])) == (i not in BAD)
        if i in BAD:
            other = dataclasses.replace(other, step=other.step + 1)
        else:
            other, _ = t.run(other, points(i))
    assert bits(learned(now)) == bits(learned(other)) != bits(learned(t.start))
    assert int(now.step) == int(other.step) == STEPS
    assert in_a_row == [1, 0, 0, 1, 2, 0, 0, 0]
    assert {k: int(now.faults[k]) for k in guard.COUNTERS} == {
        "skipped": 3, "spikes": 0, "in_a_row": 0, "shift": 0, "rollbacks": 0, "seen": 5}  # fmt: skip
    assert np.isfinite(np.concatenate([np.ravel(x) for x in jax.tree.leaves(now)])).all()


def test_all_of_the_state_is_donated_whether_or_not_the_step_counts(trainer):
    t = trainer()
    for bad in (False, True):
        old = copy(t.start)
        new, _ = t.run(old, points(0, bad))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
        assert (bits(learned(new)) == bits(learned(t.start))) == bad


def test_several_steps_in_one_dispatch_skip_the_same(trainer):
    """As single steps to rounding, and to the bit as a dispatch whose bad batch holds another bad number."""
    batches = [points(i, i in BAD) for i in range(STEPS)]
    t, several = trainer(), trainer(k=STEPS)
    now = copy(t.start)
    for batch in batches:
        now, _ = t.run(now, batch)
    at_once, metrics = several.run(copy(several.start), stacked(batches))
    np.testing.assert_array_equal(metrics["in_a_row"], [1, 0, 0, 1, 2, 0, 0, 0])
    np.testing.assert_array_equal(np.isfinite(metrics["loss"]), [i not in BAD for i in range(STEPS)])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), at_once, now)
    batches[3]["image"] = jnp.full_like(batches[3]["image"], jnp.inf)
    again, _ = several.run(copy(several.start), stacked(batches))
    assert bits(again) == bits(at_once)


def test_a_gradient_that_is_not_finite_is_enough():
    """sqrt at 0: the loss is finite and its derivative is not."""
    network = Network(
        lambda key: {"w": jnp.ones(()), "z": jnp.zeros(())},
        lambda params, x, t, cond, key=None: params["w"] * x + jnp.sqrt(params["z"]),
    )
    params = network.init(None)
    gaussian = process.make(schedules.make("flow"), "flow")
    optimizer = optax.adam(0.1)
    one = step.make_train_step(network, gaussian, timesteps.make("uniform"), optimizer, seed=0)
    begin = state.TrainState(jnp.int32(0), params, optimizer.init(params), params, ())
    end, metrics = jax.jit(one)(begin, {"image": points(0)["image"]})
    assert np.isfinite(float(metrics["loss"])) and not np.isfinite(float(metrics["grad_norm"]))
    assert int(end.faults["skipped"]) == int(end.step) == 1 and bits(learned(end)) == bits(learned(begin))


def test_who_debugs_nans_still_sees_them(trainer):
    t = trainer()
    start, batch = copy(t.start), points(0, True)
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        jax.block_until_ready(t.run(start, batch))


def test_keys_and_times_follow_the_shift(trainer):
    """Step 2 of a run that is 5 ahead in the data draws what step 7 draws."""
    t = trainer()

    def loss(step, shift):
        now = copy(t.start)
        now = dataclasses.replace(now, step=jnp.int32(step), faults={**now.faults, "shift": jnp.int32(shift)})
        return float(t.run(now, points(0))[1]["loss"])

    assert loss(2, 5) == loss(7, 0) != loss(2, 0)


def test_spikes_are_skipped_and_counted_apart(trainer, monkeypatch):
    monkeypatch.setattr(guard, "SEEN", 4)
    t, off = trainer(spike=3.0), trainer()
    now, without, before = copy(t.start), copy(off.start), None
    for i in range(10):
        batch = points(i)
        if i in (2, 7, 8):  # the first comes before there is a mean to hold it against
            batch["image"] = batch["image"] * 100
        before = bits(learned(now))
        now, metrics = t.run(now, batch)
        without, _ = off.run(without, batch)
        assert (bits(learned(now)) == before) == (i in (7, 8))
        assert int(metrics["in_a_row"]) == {7: 1, 8: 2}.get(i, 0)
    assert (int(now.faults["spikes"]), int(now.faults["skipped"])) == (2, 0)
    assert (int(without.faults["spikes"]), int(without.faults["seen"])) == (0, 4)


def test_the_running_means_are_means(monkeypatch):
    monkeypatch.setattr(guard, "SEEN", 3)
    faults = guard.fresh()
    for i, loss in enumerate([1.0, 5.0, np.nan, 6.0, 10.0]):
        good, faults = guard.judge(faults, jnp.float32(loss), jnp.float32(2.0))
        assert bool(good) == (i != 2)
    assert float(faults["loss"]) == pytest.approx(4 + (10 - 4) / 3)  # the mean of three, then one in three
    assert float(faults["grad_norm"]) == 2.0 and int(faults["seen"]) == 3 and int(faults["skipped"]) == 1


def test_a_loss_below_zero_is_no_spike():
    faults = guard.fresh() | {"seen": jnp.int32(guard.SEEN), "loss": jnp.float32(-1.0), "grad_norm": jnp.float32(1.0)}
    assert bool(guard.judge(faults, jnp.float32(-0.1), jnp.float32(1.0), spike=2.0)[0])
    assert not bool(guard.judge(faults, jnp.float32(-0.1), jnp.float32(2.1), spike=2.0)[0])


@pytest.mark.parametrize("known", [(), ("skipped", "shift")])
def test_checkpoints_from_before_the_guard_are_restored(trainer, tmp_path, known):
    start = trainer().start
    faults = {k: v + 3 for k, v in start.faults.items() if k in known}
    with checkpoint.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(dataclasses.replace(start, step=jnp.int32(5), faults=faults))
        checkpoints.wait()
        abstract = sharding.abstract(start, jax.tree.map(lambda x: x.sharding, start))
        back = checkpoints.restore(abstract)
    assert bits(learned(back)) == bits(learned(start)) and int(back.step) == 5
    assert {k: float(v) for k, v in back.faults.items()} == {k: 3.0 * (k in known) for k in start.faults}
    assert jax.tree.structure(back) == jax.tree.structure(start)
