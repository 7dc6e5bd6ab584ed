"""Time samplers: their distributions, and unbiasedness of the weighted loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jax_diffusion import schedules, timesteps
from jax_diffusion.errors import UserError

P = 1e-3  # keys are fixed, so a test either always passes or never; a wrong law at this n has p < 1e-10
N = 20000


def draw(sampler, schedule, n=N, seed=0, state=()):
    s = schedules.make(schedule)
    t, w = jax.jit(lambda k: sampler.sample(state, k, n, s))(jax.random.key(seed))
    assert t.shape == w.shape == (n,) and t.dtype == w.dtype == jnp.float32
    return np.asarray(t, np.float64), np.asarray(w), s


@pytest.mark.parametrize("sampler", [timesteps.Uniform(), timesteps.Antithetic(), timesteps.Importance()])
@pytest.mark.parametrize("schedule", ["vp", "edm", "linear"])
def test_uniform(sampler, schedule):
    """The importance sampler too, while it knows nothing."""
    s = schedules.make(schedule)
    t, w, s = draw(sampler, schedule, state=sampler.init(s))
    np.testing.assert_allclose(w, 1, rtol=1e-6)  # bins * (1/bins) in float32
    if schedule == "linear":
        assert np.all(t == np.floor(t)) and t.min() >= 0 and t.max() <= 999
        counts = np.histogram(t, bins=50, range=(0, 1000))[0]
        assert stats.chisquare(counts).pvalue > P
    else:
        assert stats.kstest(t, "uniform", (s.t_min, s.t_max - s.t_min)).pvalue > P


@pytest.mark.parametrize("n", [1, 8, 37])
def test_antithetic_has_one_time_in_every_stratum(n):
    flow = schedules.make("flow")
    keys = jax.random.split(jax.random.key(3), 400)
    t = jax.vmap(lambda k: timesteps.Antithetic().sample((), k, n, flow)[0])(keys)
    t = np.asarray(t, np.float64)
    # Strides are n equal ones: sorted gaps are 1/n, so every interval of length 1/n holds exactly one.
    gaps = np.diff(np.sort(t, axis=1), axis=1)
    np.testing.assert_allclose(gaps, 1 / n, atol=1e-6)  # float32 times
    # A stratum by the exact rule needs the rounding of a time that lies on an edge to be forgiven.
    strata = np.sort(np.floor(t * n + 1e-5 * (n > 1)), axis=1) % n
    assert np.mean(np.all(np.sort(strata, axis=1) == np.arange(n), axis=1)) > 0.99
    # The order says nothing: each position is marginally uniform.
    for position in {0, n // 2, n - 1}:
        assert stats.kstest(t[:, position], "uniform").pvalue > P


@pytest.mark.parametrize(("mean", "std"), [(-1.2, 1.2), (0.5, 0.3)])
@pytest.mark.parametrize("schedule", ["edm", "ve"])
def test_log_normal_sigma(schedule, mean, std):
    t, w, s = draw(timesteps.LogNormal(mean, std), schedule)
    assert stats.kstest(np.log(s.sigma(t)), "norm", (mean, std)).pvalue > P
    assert np.all(w == 1)  # part of EDM's objective, not a correction


@pytest.mark.parametrize("schedule", ["vp", "flow", "linear"])
def test_log_normal_where_time_has_ends(schedule):
    t, _, s = draw(timesteps.LogNormal(-0.5, 0.7), schedule)
    l = s.log_snr(t)
    # A standard error of 0.7/sqrt(20000) = 0.005, and the nearest integer time on `linear`.
    assert np.mean(-l / 2) == pytest.approx(-0.5, abs=0.025)
    assert np.std(-l / 2) == pytest.approx(0.7, abs=0.02)
    t, _, s = draw(timesteps.LogNormal(0.0, 50.0), schedule)
    assert t.min() >= np.float32(s.t_min) and t.max() <= s.t_max
    if schedule == "linear":
        assert np.all(t == np.round(t))


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.7, 0.5)])
def test_logit_normal(mean, std):
    t, w, _ = draw(timesteps.LogitNormal(mean, std), "flow")
    assert stats.kstest(np.log(t / (1 - t)), "norm", (mean, std)).pvalue > P
    assert np.all(w == 1)


def full(sampler, schedule, level):
    """A warm state whose bin i holds losses of root mean square level[i]."""
    state = sampler.init(schedule)
    bins = state["count"].shape[0]
    t = timesteps.from_unit(schedule, (jnp.arange(bins) + 0.5) / bins)
    update = jax.jit(lambda state, t, loss: sampler.update(state, t, loss, schedule))
    for h in range(sampler.history):
        if h == sampler.history - 1:
            p = sampler.probabilities(state)
            np.testing.assert_allclose(p, 1 / bins, rtol=1e-6)  # not warm yet: uniform
        sign = 1 if h % 2 else 0.5  # rms of {1, 1/2} in equal shares is sqrt(5/8)
        state = update(state, t, sign * level)
    return state


@pytest.mark.parametrize("schedule", ["vp", "linear"])
def test_importance_follows_the_second_moments(schedule):
    s = schedules.make(schedule)
    sampler = timesteps.Importance(bins=20, history=4, uniform=0.05)
    level = jnp.linspace(1.0, 6.0, 20)
    state = full(sampler, s, level)
    want = 0.95 * np.linspace(1, 6, 20) / np.linspace(1, 6, 20).sum() + 0.05 / 20
    np.testing.assert_allclose(sampler.probabilities(state), want, rtol=1e-5)  # float32
    t, w, _ = draw(sampler, schedule, state=state)
    u = np.asarray(timesteps.to_unit(s, t))
    bins = np.minimum((u * 20).astype(int), 19)
    assert stats.chisquare(np.bincount(bins, minlength=20), want * N).pvalue > P
    np.testing.assert_allclose(w, 1 / (20 * want[bins]), rtol=1e-5)
    # Unbiased: the weighted mean of any function is its uniform mean, within four standard errors.
    f = np.cos(3 * u) + u
    grid = (np.arange(1000) + 0.5) / 1000
    exact = np.mean(np.cos(3 * grid) + grid)
    assert abs(np.mean(w * f) - exact) < 4 * np.std(w * f) / N**0.5
    assert abs(np.mean(f) - exact) > 8 * np.std(f) / N**0.5  # which the unweighted mean is not


def test_importance_forgets_the_oldest_and_counts_a_bin_twice():
    s = schedules.make("flow")
    sampler = timesteps.Importance(bins=2, history=2)
    state = sampler.init(s)
    times, losses = jnp.array([0.1, 0.9, 0.2, 0.3]), jnp.array([1.0, 2.0, 3.0, 4.0])
    state = sampler.update(state, times, losses, s)
    np.testing.assert_array_equal(state["losses"], [[3, 4], [0, 2]])
    np.testing.assert_array_equal(state["count"], [2, 1])


@pytest.mark.parametrize("name", ["uniform", "antithetic", "log_normal", "logit_normal"])
def test_others_have_no_state(name):
    s = schedules.make("vp")
    sampler = timesteps.make(name)
    assert sampler.init(s) == () == sampler.update((), jnp.ones(3), jnp.ones(3), s)


@pytest.mark.parametrize("schedule", ["linear", "vp", "edm"])
def test_to_unit_undoes_from_unit(schedule):
    s = schedules.make(schedule, shift=2.0)
    u = (jnp.arange(50) + 0.5) / 50
    back = timesteps.to_unit(s, timesteps.from_unit(s, u))
    np.testing.assert_allclose(back, u, atol=6e-4)  # half a timestep of a thousand, and float32


def test_mistakes_are_one_line():
    with pytest.raises(UserError, match="antithetic"):
        timesteps.make("antithetc")
    with pytest.raises(UserError, match="log_normal"):
        timesteps.make("log_normal", sigma=1)
