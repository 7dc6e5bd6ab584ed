"""The training step: one pure function of (state, batch)."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_diffusion import experiment, sharding
from jax_diffusion.models import Network
from jax_diffusion.train import optim, state, step


def moons(batch, seed=0):
    """Points on two half circles, and which."""
    rng = np.random.default_rng(seed)
    label, angle = rng.integers(0, 2, batch), rng.uniform(0, np.pi, batch)
    x = np.stack([np.where(label, 1, -1) * np.cos(angle), np.where(label, 1, -1) * np.sin(angle)], -1)
    return {"image": jnp.asarray(x, jnp.float32), "label": jnp.asarray(label, jnp.int32)}


@pytest.fixture(scope="module")
def trainer(tiny):
    """trainer("process.prediction=x0", accumulate=4): the toy's state, step and process."""

    def make(*fields, **options):
        config = tiny("toy2d", "optim.schedule=constant", *fields)
        parts = experiment.build(config, (2,), 2)
        optimizer, _ = optim.make(config.optim, config.train.steps)
        init = state.make_init(parts.network, optimizer, parts.times, parts.process)
        mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
        start, shardings = state.create(init, jax.random.key(0), mesh)
        options = {"seed": 0, "ema_decay": 0.9, **options}
        one = step.make_train_step(parts.network, parts.process, parts.times, optimizer, **options)
        compiled = step.compile_step(one, shardings, mesh)
        return SimpleNamespace(state=start, one=one, step=compiled, parts=parts, shardings=shardings, mesh=mesh)

    return make


@pytest.fixture(scope="module")
def toy(trainer):
    return trainer()


def copy(tree):
    return jax.tree.map(jnp.copy, tree)


def close(a, b, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


def test_the_loss_falls_and_the_average_follows(toy):
    now, losses = copy(toy.state), []
    for i in range(150):
        now, metrics = toy.step(now, moons(64, seed=i))
        losses.append(float(metrics["loss"]))
    # v of unit-variance data starts at a loss of about the data's mean square and noise's.
    assert np.mean(losses[-20:]) < 0.75 * np.mean(losses[:5])
    assert int(now.step) == 150

    def apart(tree):
        return sum(float(jnp.sum((a - b) ** 2)) for a, b in zip(*map(jax.tree.leaves, tree), strict=True))

    assert 0 < apart((now.ema, now.params)) < apart((toy.state.params, now.params))


def test_the_state_is_donated_and_the_batch_is_not(toy):
    old, batch = copy(toy.state), moons(64)
    new, _ = toy.step(old, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((old.params, old.opt_state, old.ema)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((new, batch)))


def test_a_step_is_a_function_of_seed_and_step(toy, trainer):
    batch = moons(64)
    (a, ma), (b, mb) = toy.step(copy(toy.state), batch), toy.step(copy(toy.state), batch)
    assert jax.tree.all(jax.tree.map(np.array_equal, (a, ma), (b, mb)))
    _, other_seed = trainer(seed=1).step(copy(toy.state), batch)
    assert float(other_seed["loss"]) != float(ma["loss"])
    later = jax.tree.map(jnp.copy, toy.state)
    later = state.TrainState(later.step + 1, later.params, later.opt_state, later.ema, later.timesteps)
    assert float(toy.step(later, batch)[1]["loss"]) != float(ma["loss"])


def test_accumulation_changes_the_memory_and_not_the_mathematics(trainer):
    results = []
    for accumulate in (1, 4):
        t = trainer("optim.eps=1e-3", accumulate=accumulate, label_dropout=0.3)
        now = copy(t.state)
        for i in range(3):
            now, metrics = t.step(now, moons(64, seed=i))
        results.append((now, metrics))
    close(*results, atol=2e-6)
    moved = np.abs(results[0][0].params["head"]["kernel"] - t.state.params["head"]["kernel"]).max()
    assert moved > 1e-4


def test_several_steps_in_one_dispatch_are_those_steps(toy):
    batches = [moons(64, seed=i) for i in range(4)]
    now, losses = copy(toy.state), []
    for batch in batches:
        now, metrics = toy.step(now, batch)
        losses.append(float(metrics["loss"]))
    several = step.compile_step(step.several(toy.one), toy.shardings, toy.mesh, leading=1)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
    at_once, metrics = several(copy(toy.state), stacked)
    # Adam divides by |g|: rounding of a tiny gradient moves a weight by a share of the learning rate, 1e-3.
    close(at_once, now, atol=1e-4)
    np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-4)


def test_labels_are_dropped_at_the_rate_asked_for():
    n = 100_000
    label = jnp.arange(n) % 10
    dropped = step.drop_labels(jax.random.key(0), label, 10, 0.1)
    null = np.asarray(dropped == 10)
    assert abs(null.mean() - 0.1) < 5 * np.sqrt(0.1 * 0.9 / n)
    np.testing.assert_array_equal(dropped[~null], label[~null])
    for c in range(10):  # each class as often as the others
        assert abs(null[np.asarray(label) == c].mean() - 0.1) < 5 * np.sqrt(0.1 * 0.9 / (n / 10))


@pytest.mark.parametrize("rate, trained", [(1.0, [False, False, True]), (0.0, [True, True, False])])
def test_dropped_labels_train_the_null_label(trainer, rate, trained):
    t = trainer(label_dropout=rate)
    now = copy(t.state)
    for i in range(4):  # the zero-initialised layers have to move before what is below them can
        now, _ = t.step(now, moons(64, seed=i))
    moved = np.any(now.params["label"]["embedding"] != t.state.params["label"]["embedding"], axis=1)
    np.testing.assert_array_equal(moved, trained)


def test_flips_happen_in_the_step(toy):
    """Flipping changes the loss of lopsided images and not that of symmetric ones. Any two functions train."""
    network = Network(lambda key: {"w": jnp.ones(())}, lambda params, x, t, cond, key=None: params["w"] * x)
    start = toy.state.__class__(jnp.int32(0), {"w": jnp.ones(())}, (), {"w": jnp.ones(())}, ())

    def loss(image, flip):
        one = step.make_train_step(network, toy.parts.process, toy.parts.times, optax.identity(), seed=0, flip=flip)
        return float(one(start, {"image": image})[1]["loss"])

    lopsided = jnp.broadcast_to(jnp.linspace(-1, 1, 4)[:, None], (8, 4, 4, 1))
    symmetric = jnp.abs(lopsided)
    assert loss(symmetric, flip=True) == loss(symmetric, flip=False)
    assert loss(lopsided, flip=True) != loss(lopsided, flip=False)


def test_the_importance_sampler_fills_its_bins(trainer):
    t = trainer("process.timesteps=importance", "process.timesteps.bins=4", "process.timesteps.history=8")
    now = copy(t.state)
    for i in range(4):
        now, metrics = t.step(now, moons(64, seed=i))
    np.testing.assert_array_equal(now.timesteps["count"], 8)
    assert np.all(now.timesteps["losses"] > 0) and np.isfinite(float(metrics["loss"]))
    p = t.parts.times.probabilities(now.timesteps)
    assert float(jnp.sum(p)) == pytest.approx(1) and float(jnp.max(p) - jnp.min(p)) > 1e-3


def test_a_learned_variance_is_trained_by_the_bound(trainer):
    t = trainer("process.learn_variance=True", "process.prediction=epsilon", "process.schedule=linear")
    now = copy(t.state)
    for i in range(3):
        now, metrics = t.step(now, moons(64, seed=i))
    head = np.asarray(now.params["head"]["kernel"])
    assert head.shape[-1] == 4 and np.all(np.any(head != 0, axis=0)) and np.isfinite(float(metrics["loss"]))


def test_the_validation_loss_never_changes_its_noise(toy):
    parts = toy.parts
    evaluate = jax.jit(step.make_eval_step(parts.network, parts.process, parts.times, seed=0))
    batch = moons(64)
    a, b, other = (float(evaluate(toy.state.params, batch, i)) for i in (0, 0, 1))
    assert a == b != other
