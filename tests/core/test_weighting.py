"""Weightings, each where its paper states it: in the space the network predicts in."""

import jax.numpy as jnp
import numpy as np
import pytest

from jax_diffusion import process, schedules
from jax_diffusion.errors import UserError
from jax_diffusion.weighting import WEIGHTINGS

RTOL = 2e-5  # float32: lambda's rounding, exponentiated (|lambda| < 15), and a few products


def weights(schedule, prediction, weighting, **options):
    """(weight of |pred - target|^2, SNR, -dlambda/dt, t) at times over the whole range."""
    s = schedules.make(schedule)
    p = process.make(s, prediction, weighting, **options)
    t = s.t_min + jnp.linspace(0.02, 0.98, 25) * (s.t_max - s.t_min)
    t = jnp.floor(t) + 0.5 if schedule in schedules.BETAS else t
    snr = np.exp(np.asarray(s.log_snr(np.asarray(t, np.float64))))
    return np.asarray(p.loss_weight(t)), snr, np.asarray(-s.log_snr_rate(t)), t


@pytest.mark.parametrize("schedule", ["linear", "cosine", "vp"])
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr(schedule, gamma):
    """Hang et al. 2023: min(SNR, g) for x0, over SNR for epsilon, over SNR + 1 for v (trap 5)."""
    for prediction, divisor in (("x0", lambda r: 1), ("epsilon", lambda r: r), ("v", lambda r: r + 1)):
        w, snr, *_ = weights(schedule, prediction, "min_snr", gamma=gamma)
        np.testing.assert_allclose(w, np.minimum(snr, gamma) / divisor(snr), rtol=RTOL)


@pytest.mark.parametrize(("gamma", "k"), [(0.0, 1.0), (0.5, 1.0), (1.0, 2.0)])
def test_p2(gamma, k):
    """Choi et al. 2022, eq. 8: 1 / (k + SNR)^gamma of the epsilon loss."""
    w, snr, *_ = weights("linear", "epsilon", "p2", gamma=gamma, k=k)
    np.testing.assert_allclose(w, (k + snr) ** -gamma, rtol=RTOL)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_edm(sigma_data):
    """Karras et al. 2022, table 1: lambda(sigma) c_out^2 = 1, so the network's own loss has weight one."""
    w, *_ = weights("edm", "edm", "edm", sigma_data=sigma_data)
    np.testing.assert_allclose(w, 1, rtol=1e-3)  # float32; c_out is 4e-5 of sigma at sigma = 80
    w, _, _, t = weights("edm", "x0", "edm", sigma_data=sigma_data)
    np.testing.assert_allclose(w, (t**2 + sigma_data**2) / (t * sigma_data) ** 2, rtol=RTOL)


@pytest.mark.parametrize("schedule", ["linear", "vp", "cosine_continuous"])
def test_weights_of_one_in_their_own_space(schedule):
    np.testing.assert_allclose(weights(schedule, "v", "v")[0], 1, rtol=RTOL)
    for prediction in ("x0", "epsilon", "v", "score"):
        np.testing.assert_array_equal(weights(schedule, prediction, "simple")[0], 1)
    w, snr, *_ = weights(schedule, "epsilon", "truncated_snr")
    np.testing.assert_allclose(w, np.maximum(snr, 1) / snr, rtol=RTOL)


@pytest.mark.parametrize("schedule", ["vp", "edm", "cosine_continuous", "linear_log_snr"])
def test_elbo_is_half_the_rate_in_epsilon_space(schedule):
    """Kingma et al. 2021, eq. 17-18: L_inf = E |eps - eps_hat|^2 (-dlambda/dt) / 2."""
    w, _, rate, _ = weights(schedule, "epsilon", "elbo")
    np.testing.assert_allclose(w, rate / 2, rtol=RTOL)


def test_elbo_is_the_sum_of_kls_of_many_steps():
    """The integral over [t, t'] of SNR rate / 2 is half the fall of the SNR: what T -> inf KLs add up to."""
    _, snr, _, t = weights("linear_log_snr", "x0", "elbo")
    n = 20001
    fine = jnp.linspace(t[0], t[-1], n)
    p = process.make(schedules.make("linear_log_snr"), "x0", "elbo")
    integral = np.trapezoid(np.asarray(p.loss_weight(fine), np.float64), np.asarray(fine, np.float64))
    np.testing.assert_allclose(integral, (snr[0] - snr[-1]) / 2, rtol=1e-4)  # trapezoid, float32 times


@pytest.mark.parametrize("bias", [0.0, 2.0])
def test_sigmoid(bias):
    w, snr, rate, _ = weights("cosine_continuous", "epsilon", "sigmoid", bias=bias)
    np.testing.assert_allclose(w, rate / 2 / (1 + snr * np.exp(-bias)), rtol=RTOL)


@pytest.mark.parametrize("weighting", sorted(set(WEIGHTINGS) - {"simple"}))
def test_one_weighting_is_one_loss_in_every_space(weighting):
    """w c_out^2 |pred - target|^2 = w |x0 - x0_hat|^2: the same number for every prediction type."""
    s = schedules.make("vp")
    t = jnp.array([0.2, 0.5, 0.8])
    x0, x_hat, eps = np.random.default_rng(0).normal(size=(3, 3, 4)).astype(np.float32)
    losses = []
    for prediction in ("x0", "epsilon", "v", "score", "flow", "edm"):
        p = process.make(s, prediction, weighting)
        alpha, sigma = s.alpha_sigma(t)
        x_t = alpha[:, None] * x0 + sigma[:, None] * eps
        eps_hat = (x_t - alpha[:, None] * x_hat) / sigma[:, None]
        pred = p.parameterization.target(x_hat, eps_hat, t)
        losses.append(p.loss(pred, p.parameterization.target(x0, eps, t), x_t, t))
    for loss in losses[1:]:
        np.testing.assert_allclose(loss, losses[0], rtol=2e-4)  # float32; alpha is 0.04 at t = 0.8


def test_mistakes_are_one_line():
    with pytest.raises(UserError, match="min_snr"):
        process.make(schedules.make("vp"), "v", "min_snrr")
    with pytest.raises(UserError, match="min_snr"):
        process.make(schedules.make("vp"), "v", "min_snr", gama=5.0)
