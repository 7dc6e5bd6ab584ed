"""The Gaussian process: moments, the loss per sample, and the learned variance's bound."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jax_diffusion import posterior as post
from jax_diffusion import process, schedules
from jax_diffusion.errors import UserError
from jax_diffusion.weighting import WEIGHTINGS

from .toys import NAMES


@pytest.mark.parametrize("name", NAMES)
def test_q_sample_has_the_forward_moments(name):
    s = schedules.make(name)
    p = process.make(s, "epsilon")
    n = 20000
    t = jnp.asarray([np.floor(c * s.t_max) if name in schedules.BETAS else c * s.t_max for c in (0.1, 0.6)])
    x0 = jnp.broadcast_to(jnp.array([[-0.8], [0.5]], jnp.float32), (2, n))
    x_t, eps = jax.jit(p.q_sample)(jax.random.key(0), x0, t)
    alpha, sigma = s.alpha_sigma(np.asarray(t, np.float64))
    # Five standard errors of a mean and of a standard deviation of n draws.
    np.testing.assert_allclose(np.mean(x_t, 1), alpha * [-0.8, 0.5], atol=5 * np.max(sigma) / n**0.5)
    np.testing.assert_allclose(np.std(x_t, 1), sigma, rtol=5 / (2 * n) ** 0.5)
    # The target of "epsilon" is the noise that was used. float32.
    np.testing.assert_allclose(x_t, alpha[:, None] * x0 + sigma[:, None] * np.asarray(eps), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["linear", "edm", "flow"])
def test_prior_is_normal_with_the_schedules_scale(name):
    s = schedules.make(name)
    x = process.make(s).prior(jax.random.key(0), (100, 200))
    assert x.dtype == jnp.float32
    assert float(jnp.std(x)) == pytest.approx(80.0 if name == "edm" else 1.0, rel=0.025)  # 5 / sqrt(2 n)


@pytest.mark.parametrize("shape", [(5,), (5, 2), (5, 4, 4, 3)])
def test_loss_is_each_samples_own_weighted_mean(shape):
    p = process.make(schedules.make("vp"), "v", "min_snr")
    pred, target, x_t = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)
    t = jnp.linspace(0.1, 0.9, 5)
    loss = p.loss(jnp.asarray(pred), jnp.asarray(target), jnp.asarray(x_t), t)
    assert loss.shape == (5,) and loss.dtype == jnp.float32
    want = ((pred - target).astype(np.float64) ** 2).reshape(5, -1).mean(1) * np.asarray(p.loss_weight(t))
    np.testing.assert_allclose(loss, want, rtol=1e-5)  # float32 mean
    # Each is a function of its own sample alone.
    jac = jax.jacobian(lambda q: p.loss(q, jnp.asarray(target), jnp.asarray(x_t), t))(jnp.asarray(pred))
    own = np.asarray(jnp.abs(jac)).reshape(5, 5, -1).sum(-1)
    assert np.all(own[~np.eye(5, dtype=bool)] == 0) and np.all(np.diag(own) > 0)


def test_bfloat16_predictions_are_compared_in_float32():
    p = process.make(schedules.make("vp"), "v")
    pred = jnp.full((2, 64), 1.0, jnp.bfloat16)
    loss = p.loss(pred, jnp.full((2, 64), 1.001), jnp.zeros((2, 64)), jnp.array([0.3, 0.4]))
    np.testing.assert_allclose(loss, 1e-6, rtol=1e-3)  # 1.001 is 1 in bfloat16, 1e-6 in float32


# ---- learned variance (Nichol & Dhariwal 2021) ----


def bound_in_torch(betas, prediction, v, x0, x_t, t):
    """L_t in bits per dimension for one sample, from the papers' formulas in float64; epsilon prediction."""
    beta = torch.tensor(betas, dtype=torch.float64)
    bar = torch.cumprod(1 - beta, 0)
    before = bar[t - 1] if t > 0 else torch.ones((), dtype=torch.float64)
    x0_hat = (x_t - (1 - bar[t]).sqrt() * prediction) / bar[t].sqrt()

    def mean(x):  # DDPM, eq. 7
        return (before.sqrt() * beta[t] * x + (1 - beta[t]).sqrt() * (1 - before) * x_t) / (1 - bar[t])

    k = max(t, 1)
    tilde = beta[k] * (1 - bar[k - 1]) / (1 - bar[k])
    log_var = v * beta[t].log() + (1 - v) * tilde.log()  # eq. 15
    if t > 0:
        p = torch.distributions.Normal(mean(x0), tilde.sqrt())
        q = torch.distributions.Normal(mean(x0_hat), (log_var / 2).exp())
        nats = torch.distributions.kl_divergence(p, q)
    else:
        q = torch.distributions.Normal(mean(x0_hat), (log_var / 2).exp())
        upper = torch.where(x0 > 0.999, torch.ones_like(x0), q.cdf(x0 + 1 / 255))
        lower = torch.where(x0 < -0.999, torch.zeros_like(x0), q.cdf(x0 - 1 / 255))
        nats = -(upper - lower).log()
    return (nats / np.log(2)).mean().item()


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("t", [0, 1, 2, 300, 999])
def test_vlb_term_is_the_papers(name, t):
    s = schedules.make(name)
    p = process.make(s, "epsilon", learn_variance=True)
    g = np.random.default_rng(t)
    x0 = np.round(g.uniform(0, 255, size=(1, 6, 2))) / 127.5 - 1
    x0[0, 0] = [-1, 1]  # both open bins
    eps = g.normal(size=x0.shape)
    prediction = eps + 0.1 * g.normal(size=x0.shape)
    v = g.uniform(size=x0.shape)
    bar = s.alpha_bar[t]
    x_t = np.sqrt(bar) * x0 + np.sqrt(1 - bar) * eps
    want = bound_in_torch(s.betas, *(torch.tensor(a) for a in (prediction, v, x0, x_t)), t)
    got = jax.jit(p.vlb_term)(*(jnp.asarray(a, jnp.float32) for a in (x0, prediction, v, x_t)), jnp.array([float(t)]))
    # float32: variances to 3e-4 (see test_posterior), x_t rounded before it is divided by a small alpha.
    np.testing.assert_allclose(got, [want], rtol=5e-3, atol=1e-4)


def test_vlb_of_a_perfect_model_is_zero():
    s = schedules.make("linear")
    p = process.make(s, "v", learn_variance=True)
    t = jnp.array([1.0, 10.0, 500.0, 999.0])
    x0 = jax.random.uniform(jax.random.key(0), (4, 8, 8, 1), minval=-1, maxval=1)
    x_t, target = jax.jit(p.q_sample)(jax.random.key(1), x0, t)
    kl = jax.jit(p.vlb_term)(x0, target, jnp.zeros_like(x0), x_t, t)  # v = 0 is beta~, the posterior's own variance
    np.testing.assert_allclose(kl, 0, atol=1e-6)  # float32
    # With beta instead, the KL of two centred normals: (r - 1 - log r)/2 nats, r = beta~ / beta.
    kl = jax.jit(p.vlb_term)(x0, target, jnp.ones_like(x0), x_t, t)
    low, high = post.posterior_log_variances(s, t.astype(int))
    r = np.exp(np.asarray(low - high, np.float64))
    # r is within 1e-5 of one late, where float32 has lost the difference: an absolute tolerance.
    np.testing.assert_allclose(kl, (r - 1 - np.log(r)) / 2 / np.log(2), rtol=1e-3, atol=1e-6)


def hybrid():
    p = process.make(schedules.make("cosine"), "epsilon", learn_variance=True)
    t = jnp.array([0.0, 1.0, 400.0, 900.0])
    x0 = jnp.round(jax.random.uniform(jax.random.key(0), (4, 4, 4, 3)) * 255) / 127.5 - 1
    x_t, target = jax.jit(p.q_sample)(jax.random.key(1), x0, t)
    prediction = 0.5 * jax.random.normal(jax.random.key(2), (4, 4, 4, 6))
    return p, prediction, target, x_t, t


def test_hybrid_is_simple_plus_a_thousandth_of_the_sum():
    p, prediction, target, x_t, t = hybrid()
    mean, v = p.split(prediction)
    np.testing.assert_array_equal(mean, prediction[..., :3])
    np.testing.assert_allclose(v, (prediction[..., 3:] + 1) / 2, rtol=1e-6)  # float32
    x0 = p.parameterization.x0(target, x_t, t)
    simple = jnp.mean((mean - target) ** 2, (1, 2, 3))
    want = simple + 0.001 * 1000 * jax.jit(p.vlb_term)(x0, mean, v, x_t, t)
    np.testing.assert_allclose(p.loss(prediction, target, x_t, t), want, rtol=1e-5)  # float32


def test_the_bounds_gradient_reaches_the_variance_alone():
    p, prediction, target, x_t, t = hybrid()
    grad = jax.jit(jax.grad(lambda q: jnp.sum(p.loss(q, target, x_t, t))))(prediction)
    assert jnp.all(jnp.isfinite(grad))
    simple = 2 * (prediction[..., :3] - target) / (4 * 4 * 3)
    np.testing.assert_allclose(grad[..., :3], simple, rtol=1e-5, atol=1e-7)  # that of L_simple, to float32
    assert jnp.all(jnp.any(grad[..., 3:] != 0, axis=(1, 2, 3)))


def test_denoised_reads_the_mean_half():
    p, prediction, target, x_t, t = hybrid()
    both = jnp.concatenate([target, prediction[..., 3:]], -1)
    np.testing.assert_array_equal(p.denoised(both, x_t, t), p.parameterization.x0(target, x_t, t))


def test_learned_variance_needs_a_chain():
    with pytest.raises(UserError, match="discrete"):
        process.make(schedules.make("vp"), learn_variance=True)


@pytest.mark.parametrize("prediction", ["epsilon", "score", "edm"])
@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_pure_noise_has_no_epsilon_prediction(prediction, shift):
    """Knowing x_T = eps exactly says nothing of x_0 (Lin et al. 2023, section 3.2)."""
    with pytest.raises(UserError, match="zero terminal SNR"):
        process.make(schedules.make("linear", zero_terminal_snr=True, shift=shift), prediction)


@pytest.mark.parametrize("weighting", sorted(WEIGHTINGS))
@pytest.mark.parametrize("prediction", ["v", "x0", "flow"])
def test_losses_are_finite_on_pure_noise(prediction, weighting):
    """At T-1 lambda is -infinity and falls at an infinite rate; no loss may say so. x_0 comes back at every time."""
    p = process.make(schedules.make("linear", zero_terminal_snr=True), prediction, weighting, learn_variance=True)
    t = jnp.array([0.0, 1.0, 500.0, 998.0, 999.0])
    x0 = 0.5 * jax.random.normal(jax.random.key(0), (5, 2, 2, 1))
    x_t, target = p.q_sample(jax.random.key(1), x0, t)
    said = jnp.concatenate([target + 0.1, jnp.zeros_like(target)], -1)
    loss, grad = jax.value_and_grad(lambda q: jnp.sum(p.loss(q, target, x_t, t)))(said)
    assert jnp.isfinite(loss) and jnp.all(jnp.isfinite(grad))
    assert jnp.all(jnp.isfinite(p.denoised(said, x_t, t)))
    np.testing.assert_allclose(p.parameterization.x0(target, x_t, t), x0, rtol=1e-2, atol=2e-3)  # float32 / alpha_998
