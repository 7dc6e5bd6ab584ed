"""The reverse transition: DDPM's formulas, Bayes' rule, and the two terms of the bound."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import stats

from jax_diffusion import posterior as post
from jax_diffusion import schedules

DISCRETE = ("linear", "cosine", "scaled_linear", "sigmoid", "geometric")


def coefficients(s, t, u):
    """Float64 weights and variances of the step t -> u."""
    t, u = np.asarray(t, np.float64), np.asarray(u, np.float64)
    (at, st), (au, su) = s.alpha_sigma(t), s.alpha_sigma(u)
    return post.coefficients(s.log_snr(t), s.log_snr(u), at, au, st, su, xp=np)


@pytest.mark.parametrize("name", DISCRETE)
def test_equals_ddpm_equations_6_and_7(name):
    s = schedules.make(name)
    beta, bar = s.betas, s.alpha_bar
    t = np.arange(1, 1000)
    w_x, w_0, small, large = coefficients(s, t, t - 1)
    tilde = beta[1:] * (1 - bar[:-1]) / (1 - bar[1:])
    # Float64; 1 - bar and the difference of two lambdas near t = 0 cost some digits.
    np.testing.assert_allclose(w_0, np.sqrt(bar[:-1]) * beta[1:] / (1 - bar[1:]), rtol=1e-8)
    np.testing.assert_allclose(w_x, np.sqrt(1 - beta[1:]) * (1 - bar[:-1]) / (1 - bar[1:]), rtol=1e-8)
    np.testing.assert_allclose(small, tilde, rtol=1e-8)
    np.testing.assert_allclose(large, beta[1:], rtol=1e-8)


@pytest.mark.parametrize(("name", "peer_name"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_variances_are_those_of_diffusers(name, peer_name):
    s = schedules.make(name)
    peer = diffusers.DDPMScheduler(beta_schedule=peer_name)
    peer.alphas_cumprod = torch.from_numpy(s.alpha_bar)  # its formula in float64, on our table
    t = [1, 2, 500, 998, 999]
    _, _, small, large = coefficients(s, t, np.array(t) - 1)
    theirs = [[float(peer._get_variance(i, variance_type=v)) for i in t] for v in ("fixed_small", "fixed_large")]
    np.testing.assert_allclose(small, theirs[0], rtol=1e-8)  # as above
    np.testing.assert_allclose(large, theirs[1], rtol=1e-8)


@pytest.mark.parametrize("name", ["linear", "vp", "subvp", "ve", "edm", "flow", "cosine_continuous"])
@pytest.mark.parametrize(("far", "near"), [(0.9, 0.5), (0.5, 0.45), (0.3, 0.05)])
def test_is_bayes_rule(name, far, near):
    """q(x_s | x_t, x_0) is proportional to q(x_s | x_0) q(x_t | x_s): add precisions, weigh means."""
    s = schedules.make(name)
    t, u = (np.round(c * s.t_max) if name == "linear" else c * s.t_max for c in (far, near))
    (at, st), (au, su) = s.alpha_sigma(np.float64(t)), s.alpha_sigma(np.float64(u))
    a = at / au
    var = st**2 - a**2 * su**2
    precision = 1 / su**2 + a**2 / var
    x0, x_t = 0.7, -1.3
    mean = (au * x0 / su**2 + a * x_t / var) / precision
    w_x, w_0, small, large = coefficients(s, t, u)
    np.testing.assert_allclose([w_x * x_t + w_0 * x0, small, large], [mean, 1 / precision, var], rtol=1e-9)
    got, variance = post.posterior(s, jnp.full((2, 3), x0), jnp.full((2, 3), x_t), jnp.full((2,), t), jnp.full((2,), u))
    assert variance.shape == (2,)
    # float32: the step 1 - SNR_t/SNR_s loses a few digits where the two times are close.
    np.testing.assert_allclose(got, np.full((2, 3), mean), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(variance, np.full(2, 1 / precision), rtol=1e-3)


def test_adjacent_steps_keep_their_digits_in_float32():
    s = schedules.make("linear")
    t = jnp.arange(1.0, 1000.0)
    _, variance = post.posterior(s, jnp.zeros((999, 1)), jnp.zeros((999, 1)), t, t - 1)
    # lambda is 9 at most, its rounding 5e-7; the step in lambda is above 5e-3: a relative 2e-4 at worst.
    np.testing.assert_allclose(variance, coefficients(s, t, t - 1)[2], rtol=3e-4)


@pytest.mark.parametrize("name", DISCRETE)
def test_learned_variance_bounds(name):
    s = schedules.make(name)
    low, high = post.posterior_log_variances(s, jnp.arange(1000))
    bar = s.alpha_bar
    tilde = s.betas[1:] * (1 - bar[:-1]) / (1 - bar[1:])
    np.testing.assert_allclose(low[1:], np.log(tilde), rtol=1e-6)  # float32
    np.testing.assert_allclose(high, np.log(s.betas), rtol=1e-6)
    assert low[0] == low[1]  # log 0 is replaced by its neighbour
    assert jnp.all(low[1:] <= high[1:])


def test_normal_kl_is_torchs():
    g = np.random.default_rng(0)
    m1, l1, m2, l2 = g.normal(size=(4, 50))
    N = torch.distributions.Normal
    p, q = (N(torch.tensor(m), torch.tensor(np.exp(l / 2))) for m, l in ((m1, l1), (m2, l2)))
    ours = post.normal_kl(*(jnp.asarray(a) for a in (m1, l1, m2, l2)))
    np.testing.assert_allclose(ours, torch.distributions.kl_divergence(p, q), rtol=1e-4, atol=1e-5)  # float32
    same = jnp.asarray(m1)
    assert jnp.all(post.normal_kl(same, same, same, same) == 0)


GRID = np.arange(256) / 127.5 - 1


@pytest.mark.parametrize("log_var", [-11.0, -6.0, -2.0, 0.0])
@pytest.mark.parametrize("mean", [-1.4, -0.3, 0.0, 0.999, 2.0])
def test_masses_of_the_256_bins_sum_to_one(mean, log_var):
    nll = post.discretized_gaussian_nll(jnp.asarray(GRID), jnp.full((256,), mean), jnp.full((256,), log_var))
    assert np.exp(-np.asarray(nll, np.float64)).sum() == pytest.approx(1, abs=2e-4)  # float32 cdf differences


@pytest.mark.parametrize("log_var", [-9.0, -4.0, 0.0])
@pytest.mark.parametrize("mean", [-0.8, 0.1, 0.6])
def test_nll_is_the_cdf_difference(mean, log_var):
    sd = np.exp(log_var / 2)
    upper, lower = GRID + 1 / 255, GRID - 1 / 255
    upper[-1], lower[0] = np.inf, -np.inf
    # From the tail the bin is in, or the difference would be 1 - 1.
    right = stats.norm.sf(lower, mean, sd) - stats.norm.sf(upper, mean, sd)
    left = stats.norm.cdf(upper, mean, sd) - stats.norm.cdf(lower, mean, sd)
    mass = np.where(mean < GRID, right, left)
    seen = mass > 1e-290  # further out scipy underflows
    nll = post.discretized_gaussian_nll(jnp.asarray(GRID), jnp.full((256,), mean), jnp.full((256,), log_var))
    # float32: z carries 1e-7 relative, so z^2/2 (the nll of a tail) a few times that.
    np.testing.assert_allclose(nll[seen], -np.log(mass[seen]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mean", [-300.0, -5.0, 0.0, 5.0, 300.0])
@pytest.mark.parametrize("log_var", [-12.0, 0.0, 6.0])
def test_nll_is_finite_with_finite_gradients_far_out(mean, log_var):
    x0 = jnp.asarray(GRID[[0, 1, 128, 254, 255]], jnp.float32)

    def total(m, l):
        return jnp.sum(post.discretized_gaussian_nll(x0, jnp.full((5,), m), jnp.full((5,), l)))

    value, grads = jax.value_and_grad(total, (0, 1))(mean, log_var)
    assert np.isfinite(value) and value >= 0
    assert np.all(np.isfinite(grads))
    if abs(mean) > 1:
        assert np.sign(grads[0]) == np.sign(mean)  # it pulls the mean back
