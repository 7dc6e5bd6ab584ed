"""Exact likelihoods and variational bounds of optimal denoisers, for which the right answer is known."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import stats

from jax_diffusion import bound, likelihood, schedules
from jax_diffusion.errors import UserError
from jax_diffusion.guidance import Denoised
from jax_diffusion.shapes import per_sample
from jax_diffusion.solvers import make, noise

MEAN = np.array([0.5, -0.2, 0.1])
ROOT = np.array([[0.6, 0, 0], [0.3, 0.4, 0], [-0.2, 0.1, 0.15]])
COV = ROOT @ ROOT.T
VALUES, VECTORS = np.linalg.eigh(COV)
X = MEAN + np.random.default_rng(0).normal(size=(8, 3)) @ ROOT.T
LN2 = math.log(2)


def correlated(schedule):
    """E[x_0 | x_t] of N(MEAN, COV)."""
    mean, values, vectors = (jnp.asarray(c, jnp.float32) for c in (MEAN[None], VALUES[None], VECTORS))

    def denoise(x, t):
        a, s = (per_sample(c, x) for c in schedule.alpha_sigma(t))
        return mean + (a * values / (a * a * values + s * s) * ((x - a * mean) @ vectors)) @ vectors.T

    return denoise


def pushed_forward(schedule, solver):
    """The law that the exact flow gives x_0 = x / alpha, from the prior that it starts with; scipy, float64."""
    (a0, s0), (aT, sT) = (schedule.alpha_sigma(np.float64(t)) for t in (solver.frame.last_time, solver.t[0]))
    shrink = np.sqrt((a0**2 * VALUES + s0**2) / (aT**2 * VALUES + sT**2)) / a0
    M = VECTORS @ np.diag(shrink) @ VECTORS.T
    return stats.multivariate_normal(MEAN - M @ (aT * MEAN), float(solver.scale) ** 2 * M @ M.T)


@pytest.mark.parametrize("name", ["vp", "edm", "flow", "linear"])
def test_exact_likelihood_of_a_correlated_gaussian(name):
    schedule = schedules.make(name)
    solver = make("rk45", schedule, 20, rtol=1e-5, atol=1e-5)
    x = jnp.asarray(X, jnp.float32)

    def run(solver, steps=None):
        return likelihood.log_likelihood(
            jax.random.key(0), correlated(schedule), solver, x, divergence="exact", steps=steps
        )

    out = jax.jit(run)(solver)
    exact = pushed_forward(schedule, solver).logpdf(X)
    np.testing.assert_allclose(out.log_prob, exact, atol=1e-3)  # of 3 dimensions, at 1e-5 each
    # The model is the data's law but for the noise at t_min and for what is left of the signal at t_max.
    a0, s0 = schedule.alpha_sigma(np.float64(solver.frame.last_time))
    data = stats.multivariate_normal(MEAN, COV + (s0 / a0) ** 2 * np.eye(3)).logpdf(X)
    np.testing.assert_allclose(out.log_prob, data, atol=0.02)
    # Heun's error is second order.
    errors = [np.abs(jax.jit(run, static_argnums=1)(solver, n).log_prob - exact).max() for n in (50, 100)]
    assert errors[1] < 0.1 and errors[0] / errors[1] == pytest.approx(4, rel=0.35)


@pytest.mark.parametrize("derivative", ["forward", "reverse"])
@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_hutchinsons_estimate_is_unbiased(probe, derivative):
    schedule, n = schedules.make("flow"), 4000
    solver = make("rk45", schedule, 20)
    # A probe of one dimension is exact if Rademacher; three correlated ones have off-diagonal terms.
    x = jnp.tile(jnp.asarray(X[:1], jnp.float32), (n, 1))

    def run(solver):
        return likelihood.log_likelihood(
            jax.random.key(1), correlated(schedule), solver, x, divergence=probe, derivative=derivative
        )

    got = np.asarray(jax.jit(run)(solver).log_prob, np.float64)
    stderr = got.std() / np.sqrt(n)
    assert 0 < stderr < (0.03 if probe == "rademacher" else 0.6)
    assert abs(got.mean() - pushed_forward(schedule, solver).logpdf(X[0])) < 4 * stderr + 1e-3


def test_an_estimate_depends_on_the_sample_alone():
    schedule = schedules.make("flow")
    solver = make("rk45", schedule, 20, rtol=1e-3, atol=1e-3)

    @jax.jit
    def run(rows, x):
        return likelihood.log_likelihood(jax.random.key(0), correlated(schedule), solver, x, indices=rows)

    x = jnp.asarray(X, jnp.float32)
    together, alone = run(jnp.arange(8), x), run(jnp.array([5]), x[5:6])
    np.testing.assert_allclose(together.log_prob[5], alone.log_prob[0], rtol=1e-4)
    assert together.evaluations[5] == alone.evaluations[0]


def test_bits_of_dequantised_data():
    """A density that is flat over [-1 - 1/255, 1 + 1/255] gives each of 256 values 8 bits, whatever the draw."""
    x = likelihood.dequantize(jax.random.key(0), jnp.asarray(bound.LEVELS, jnp.float32)[:, None])
    off = (np.asarray(x)[:, 0] - bound.LEVELS) * 127.5
    assert np.abs(off).max() <= 0.5 + 1e-4 and abs(off.mean()) < 4 / np.sqrt(12 * 256)
    log_prob = jnp.full((3,), -12 * math.log(2 + 2 / 255))
    np.testing.assert_allclose(likelihood.bits_per_dim(log_prob, (2, 6)), 8, rtol=1e-5)


def test_mistakes():
    vp, x = schedules.make("vp"), jnp.zeros((2, 3))
    solver, D, key = make("rk45", vp, 20), correlated(vp), jax.random.key(0)
    for options, words in (
        ({"divergence": "radmacher"}, "did you mean 'rademacher'"),
        ({"derivative": "back"}, "derivative='back'"),
        ({"steps": 0}, "steps=0"),
    ):
        with pytest.raises(UserError, match=words):
            likelihood.log_likelihood(key, D, solver, x, **options)
    linear = schedules.make("linear")
    for schedule, options, words in (
        (vp, {}, "continuous_bound"),
        (linear, {"variance": "learned"}, "variance='learned'"),
        (linear, {"variance": "fixed"}, "variance='fixed'"),
        (linear, {"steps": 1}, "steps=1"),
        (linear, {"steps": 2000}, "steps=2000"),
    ):
        with pytest.raises(UserError, match=words):
            bound.variational_bound(key, correlated(schedule), schedule, x, **options)


# ---- the variational bound ----


def grid_images(shape, seed=0):
    return bound.LEVELS[np.random.default_rng(seed).integers(0, 256, shape)]


@pytest.mark.parametrize("variance", bound.VARIANCES)
@pytest.mark.parametrize("steps", [None, 7])
def test_every_term_is_ddpms(variance, steps):
    """Against DDPM's eq. 5-8 and 13 in float64 on torch's distributions, for a denoiser that is not optimal."""
    schedule = schedules.make("linear", steps=40, start=0.0025, end=0.5)
    x0, key = grid_images((4, 2, 3)), jax.random.key(5)

    def denoise(x, t):
        return Denoised(0.8 * x + 0.01 * per_sample(t, x), jax.nn.sigmoid(3 * x))

    got = bound.variational_bound(
        key, denoise, schedule, jnp.asarray(x0, jnp.float32), variance=variance, steps=steps
    )  # fmt: skip
    t = np.arange(40) if steps is None else np.round(np.linspace(0, 39, steps)).astype(int)
    bar = np.cumprod(1 - np.linspace(0.0025, 0.5, 40))[t]
    before = np.append(1.0, bar[:-1])
    beta = 1 - bar / before
    tilde = beta * (1 - before) / (1 - bar)
    N, x0 = torch.distributions.Normal, torch.tensor(x0)
    keys = noise.sample_keys(key, jnp.arange(4))
    for i in range(len(t)):
        eps = torch.tensor(np.array(noise.normal(keys, i, (2, 3)), np.float64))
        x = np.sqrt(bar[i]) * x0 + np.sqrt(1 - bar[i]) * eps
        D, v = 0.8 * x + 0.01 * t[i], torch.sigmoid(3 * x)
        low = tilde[max(i, 1)]
        log_var = {
            "fixed_small": torch.full_like(x, np.log(low)),
            "fixed_large": torch.full_like(x, np.log(beta[i] if i else low)),
            "learned": v * np.log(beta[i]) + (1 - v) * np.log(low),
        }[variance]
        if i == 0:
            p = N(D, torch.exp(log_var / 2))
            upper = torch.where(x0 > 0.999, 1.0, p.cdf(x0 + 1 / 255))
            lower = torch.where(x0 < -0.999, 0.0, p.cdf(x0 - 1 / 255))
            want, seen = -torch.log(upper - lower), upper - lower > 1e-9
            if not bool(seen.all()):
                continue  # 1 - 1 in float64; tests/core/test_posterior.py has the tails
        else:
            w_0 = np.sqrt(before[i]) * beta[i] / (1 - bar[i])
            w_x = np.sqrt(1 - beta[i]) * (1 - before[i]) / (1 - bar[i])
            q = N(w_0 * x0 + w_x * x, np.sqrt(tilde[i]))
            want = torch.distributions.kl_divergence(q, N(w_0 * D + w_x * x, torch.exp(log_var / 2)))
        np.testing.assert_allclose(got.terms[i], want.mean((1, 2)) / LN2, rtol=2e-4, atol=1e-5)
    q, p = N(np.sqrt(bar[-1]) * x0, np.sqrt(1 - bar[-1])), N(0.0, 1.0)
    np.testing.assert_allclose(got.prior, torch.distributions.kl_divergence(q, p).mean((1, 2)) / LN2, rtol=1e-4)
    np.testing.assert_allclose(got.total, got.prior + got.terms.sum(0), rtol=1e-6)


S2 = 0.3
ENTROPY = 0.5 * np.log2(2 * np.pi * np.e * S2)


def gaussian(schedule):
    """The optimal denoiser of N(0, S2), with the variance beta~ above t = 0 and sigma^2 there."""

    def denoise(x, t):
        a, s = (per_sample(c, x) for c in schedule.alpha_sigma(t))
        return Denoised(a * S2 * x / (a * a * S2 + s * s), per_sample(t == 0, x) * jnp.ones_like(x))

    return denoise


def analytic_bound(log_snr):
    """Its expectation, term by term, in bits: E|x_0 - D|^2 = S2 / (1 + SNR S2). log_snr: [T], falling in t."""
    snr = np.exp(log_snr)
    mmse = S2 / (1 + snr * S2)
    transitions = 0.5 * (snr[:-1] - snr[1:]) * mmse[1:]  # Kingma et al. 2021, eq. 13-14
    bar, var = snr / (1 + snr), 1 / (1 + snr)
    decoder = 0.5 * (np.log(2 * np.pi * var[0]) + mmse[0] / var[0])
    prior = 0.5 * (var[-1] + bar[-1] * S2 - 1 - np.log(var[-1]))
    return np.array([decoder, transitions.sum(), prior]) / LN2


def uniform_in_log_snr(T):
    bar = 1 / (1 + np.exp(-np.linspace(11.0, -10.0, T)))
    return schedules.Discrete(1 - bar / np.append(1.0, bar[:-1]))


def test_the_bound_of_an_optimal_gaussian_is_its_entropy_in_the_limit():
    """With lambda uniform in [-10, 11] the gap to the entropy falls as 1/T; at T = 1000 it is 0.067 bits,
    nearly half a step of lambda (0.021) times the 7.1 bits that the chain transmits."""
    gaps = [analytic_bound(uniform_in_log_snr(T).log_snr_table).sum() - ENTROPY for T in (250, 500, 1000, 2000)]
    for a, b in itertools.pairwise(gaps):
        assert a / b == pytest.approx(2, abs=0.05)
    assert gaps[2] == pytest.approx(0.067, abs=1e-3)


def test_the_discrete_bound_of_an_optimal_gaussian():
    schedule, n = uniform_in_log_snr(1000), 1000
    x0 = jnp.asarray(np.random.default_rng(0).normal(size=(n, 30)) * S2**0.5, jnp.float32)
    run = jax.jit(
        lambda x: bound.variational_bound(
            jax.random.key(0), gaussian(schedule), schedule, x, variance="learned", discretized=False
        )
    )
    got = run(x0)
    parts = (got.terms[0], got.terms[1:].sum(0), got.prior)
    for part, want in zip(parts, analytic_bound(schedule.log_snr_table), strict=True):
        part = np.asarray(part, np.float64)
        assert part.mean() == pytest.approx(want, abs=4.5 * part.std() / np.sqrt(n) + 1e-6)
    total = np.asarray(got.total, np.float64)
    stderr = total.std() / np.sqrt(n)
    assert stderr < 0.02 and abs(total.mean() - ENTROPY - 0.067) < 4.5 * stderr


@pytest.mark.parametrize("name", ["vp", "edm", "flow", "linear", "linear_log_snr"])
def test_the_continuous_bound_of_an_optimal_gaussian_is_its_entropy(name):
    """I(x_0; x_tmin) + H(x_0 | x_tmin), up to the decoder's and the prior's misfit, both below 1e-3 here."""
    schedule, n = schedules.make(name), 2000
    x0 = jnp.asarray(np.random.default_rng(0).normal(size=(n, 10)) * S2**0.5, jnp.float32)
    got = jax.jit(
        lambda x: bound.continuous_bound(
            jax.random.key(0), gaussian(schedule), schedule, x, times=32, discretized=False
        )
    )(x0)
    total, diffusion = (np.asarray(c, np.float64) for c in (got.total, got.diffusion))
    ends = [min(max(float(schedule.log_snr(np.float64(t))), -20), 20) for t in (schedule.t_min, schedule.t_max)]
    mutual = 0.5 * np.log2((1 + np.exp(ends[0]) * S2) / (1 + np.exp(ends[1]) * S2))
    assert diffusion.mean() == pytest.approx(mutual, abs=4.5 * diffusion.std() / np.sqrt(n))
    stderr = total.std() / np.sqrt(n)
    assert stderr < 0.05 and total.mean() == pytest.approx(ENTROPY, abs=4.5 * stderr + 1e-3)


P = np.exp(-0.5 * ((bound.LEVELS - 0.6) / 0.3) ** 2)  # a grey level's probability; white is likely
P /= P.sum()
BITS = -(P * np.log2(P)).sum()


def categorical(schedule):
    """The optimal denoiser of independent pixels of law P."""

    def denoise(x, t):
        a, s = (per_sample(c, x)[..., None] for c in schedule.alpha_sigma(t))
        levels, log_p = (jnp.asarray(c, jnp.float32).reshape((1,) * x.ndim + (-1,)) for c in (bound.LEVELS, np.log(P)))
        share = jax.nn.softmax(log_p - 0.5 * jnp.square((x[..., None] - a * levels) / s), axis=-1)
        return jnp.sum(share * levels, axis=-1)

    return denoise


def pixels(n):
    return jnp.asarray(np.random.default_rng(1).choice(bound.LEVELS, p=P, size=(n, 16)), jnp.float32)


@pytest.mark.parametrize("name", ["flow", "linear_log_snr"])
def test_the_continuous_bound_on_8_bit_data_is_the_entropy(name):
    """The decoder knows the 256 values, so at the least noise nearly nothing of a pixel is left unsaid."""
    schedule, n = schedules.make(name), 250
    got = jax.jit(
        lambda x: bound.continuous_bound(jax.random.key(0), categorical(schedule), schedule, x, times=32)
    )(pixels(n))  # fmt: skip
    total = np.asarray(got.total, np.float64)
    stderr = total.std() / np.sqrt(n)
    assert got.reconstruction.mean() < 0.02  # sigma = 0.0013 at lambda = 13.3, half a bin is 0.0039
    assert stderr < 0.1 and total.mean() == pytest.approx(BITS, abs=4.5 * stderr + 0.02)


@pytest.mark.parametrize(("variance", "most"), [("fixed_small", 1.0), ("fixed_large", 0.15)])
def test_the_discrete_bound_on_8_bit_data_is_just_above_the_entropy(variance, most):
    """DDPM's linear schedule: the gap is that of its variances. 0.7 bits for beta~, 0.07 for beta."""
    schedule, n = schedules.make("linear"), 100
    got = jax.jit(
        lambda x: bound.variational_bound(jax.random.key(0), categorical(schedule), schedule, x, variance=variance)
    )(pixels(n))
    total = np.asarray(got.total, np.float64)
    stderr = total.std() / np.sqrt(n)
    assert BITS - 4.5 * stderr < total.mean() < BITS + most + 4.5 * stderr, (total.mean(), BITS, stderr)
