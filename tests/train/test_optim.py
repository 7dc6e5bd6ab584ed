"""Learning rates against their formulas, the optimizer against PyTorch's, the average against its recursion."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_diffusion import config as configs
from jax_diffusion.errors import UserError
from jax_diffusion.train import ema, optim

PEAK, WARMUP, STEPS = 2e-3, 10, 110


@pytest.mark.parametrize("name", ["constant", "cosine", "inverse_sqrt"])
def test_warmup_rises_linearly_to_the_peak(name):
    rate = optim.learning_rate(name, PEAK, WARMUP, STEPS)
    np.testing.assert_allclose([rate(n) for n in range(WARMUP)], PEAK * np.arange(1, 11) / 10, rtol=1e-6)


@pytest.mark.parametrize(
    "name, formula",
    [
        ("constant", lambda n: PEAK + 0 * n),
        ("cosine", lambda n: PEAK * (1 + np.cos(np.pi * (n - WARMUP) / (STEPS - WARMUP))) / 2),
        ("inverse_sqrt", lambda n: PEAK * np.sqrt(WARMUP / n)),
    ],
)
def test_after_the_warmup(name, formula):
    rate = optim.learning_rate(name, PEAK, WARMUP, STEPS)
    n = np.arange(WARMUP, STEPS + 1)
    np.testing.assert_allclose([rate(i) for i in n], formula(n), rtol=1e-5, atol=1e-9)


def test_cosine_ends_at_zero():
    assert float(optim.learning_rate("cosine", PEAK, WARMUP, STEPS)(STEPS)) == 0


def test_one_cycle_peaks_after_the_warmup_and_ends_low():
    rates = [float(optim.learning_rate("one_cycle", PEAK, 30, STEPS)(n)) for n in range(STEPS + 1)]
    assert np.argmax(rates) == 30 and rates[30] == pytest.approx(PEAK)
    assert rates[0] < PEAK / 10 and rates[-1] < PEAK / 1000


def test_no_warmup_starts_at_the_peak():
    assert float(optim.learning_rate("cosine", PEAK, 0, STEPS)(0)) == pytest.approx(PEAK)


@pytest.mark.parametrize("warmup", [-1, STEPS])
def test_a_warmup_that_does_not_fit(warmup):
    with pytest.raises(UserError, match=f"optim.warmup={warmup} does not fit train.steps={STEPS}"):
        optim.learning_rate("cosine", PEAK, warmup, STEPS)


def test_an_unknown_schedule_is_named_with_its_neighbour():
    with pytest.raises(UserError, match="did you mean 'cosine'"):
        optim.learning_rate("cosin", PEAK, WARMUP, STEPS)


def optimizer(**fields):
    config = configs.default().optim
    config.update({"learning_rate": 1e-2, "warmup": 0, **fields})
    return optim.make(config, STEPS)[0]


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_adamw_and_clipping_are_those_of_torch(clip):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    params = {"kernel": rng.standard_normal((4, 3)), "bias": rng.standard_normal(3)}
    params = {k: jnp.asarray(v, jnp.float32) for k, v in params.items()}
    theirs = {k: torch.nn.Parameter(torch.tensor(np.asarray(v))) for k, v in params.items()}
    ours = optimizer(b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.1, clip=clip)
    groups = [{"params": [theirs["kernel"]]}, {"params": [theirs["bias"]], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    state = ours.init(params)
    for step in range(6):
        # Norms on both sides of the clip's 1.
        grads = {k: (0.05, 3.0)[step % 2] * rng.standard_normal(v.shape) for k, v in params.items()}
        for k, p in theirs.items():
            p.grad = torch.tensor(grads[k], dtype=torch.float32)
        if clip:
            torch.nn.utils.clip_grad_norm_(theirs.values(), clip)
        adamw.step()
        grads = {k: jnp.asarray(g, jnp.float32) for k, g in grads.items()}
        updates, state = ours.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for k, p in theirs.items():
            np.testing.assert_allclose(params[k], p.detach().numpy(), rtol=2e-5, atol=1e-6)


def test_only_matrices_and_kernels_decay():
    params = {"conv": jnp.ones((3, 3, 2, 2)), "dense": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    ours = optimizer(weight_decay=0.5)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = ours.update(zero, ours.init(params), params)
    np.testing.assert_allclose(updates["conv"], -0.5 * 1e-2, rtol=1e-5)
    np.testing.assert_allclose(updates["dense"], -0.5 * 1e-2, rtol=1e-5)
    assert not np.any(updates["bias"])


@pytest.mark.parametrize("warmup, left", [(True, 0.0), (False, 0.9999**10_000)])
def test_what_the_average_still_holds_of_the_initialisation(warmup, left):
    """A weight that is 1 at first and 0 ever after: 37 % of it remain without a warm-up."""
    decays = jax.vmap(lambda n: ema.decay_at(n, 0.9999, warmup))(jnp.arange(10_000))
    average, _ = jax.lax.scan(lambda e, d: (ema.update(e, 0.0, d), None), jnp.float32(1), decays)
    assert float(average) == pytest.approx(left, rel=2e-3, abs=1e-6)


def test_the_average_follows_its_recursion():
    rng = np.random.default_rng(0)
    path = rng.standard_normal((50, 3))
    expected, average = np.zeros(3), {"w": jnp.zeros(3)}
    for n, p in enumerate(path):
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * p
        average = ema.update(average, {"w": jnp.asarray(p, jnp.float32)}, ema.decay_at(jnp.int32(n), 0.9))
    np.testing.assert_allclose(average["w"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("warmup, hold", [(10, 40), (0, 40), (40, 40)])
def test_inverse_sqrt_is_that_of_edm2(warmup, hold):
    """Eq. 67 times a linear ramp; the ramp begins at its first step, where the original's is 0."""
    rate = optim.learning_rate("inverse_sqrt", PEAK, warmup, STEPS, hold)
    n = np.arange(1000)
    expected = PEAK / np.sqrt(np.maximum(n / hold, 1)) * np.minimum((n + 1) / max(warmup, 1), 1)
    np.testing.assert_allclose([rate(i) for i in n[::7]], expected[::7], rtol=1e-6)


@pytest.mark.parametrize("name, hold", [("inverse_sqrt", 5), ("cosine", 50)])
def test_a_hold_that_does_not_fit(name, hold):
    with pytest.raises(UserError, match=f"optim.hold={hold} needs optim.schedule=inverse_sqrt and at least the"):
        optim.learning_rate(name, PEAK, WARMUP, STEPS, hold)
