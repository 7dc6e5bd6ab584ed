"""One reverse transition of a Gaussian process, and how far a model's is from it.

For times s < t write alpha_{t|s} = alpha_t / alpha_s and sigma_{t|s}^2 = sigma_t^2 - alpha_{t|s}^2 sigma_s^2.
The posterior is Gaussian (Kingma et al. 2021, app. A; DDPM eq. 6-7 when t = s + 1):

    q(x_s | x_t, x_0) = N( alpha_{t|s} sigma_s^2 / sigma_t^2 x_t + alpha_s sigma_{t|s}^2 / sigma_t^2 x_0,
                           sigma_{t|s}^2 sigma_s^2 / sigma_t^2 I ).
"""

import jax
import jax.numpy as jnp
import numpy as np

from jax_diffusion.schedules import Discrete
from jax_diffusion.shapes import per_sample

LOG_2PI = 1.8378770664093453


def coefficients(log_snr_t, log_snr_s, alpha_t, alpha_s, sigma_t, sigma_s, xp=jnp):
    """(weight of x_t, weight of x_0, posterior variance, transition variance sigma_{t|s}^2).

    sigma_{t|s}^2 / sigma_t^2 = 1 - SNR_t / SNR_s is taken through expm1: adjacent steps of a long chain differ
    in the fourth digit, and subtracting squares in float32 would leave little of it.
    """
    step = -xp.expm1(log_snr_t - log_snr_s)
    return (
        (alpha_t / alpha_s) * (sigma_s / sigma_t) ** 2,
        alpha_s * step,
        sigma_s**2 * step,
        sigma_t**2 * step,
    )


def posterior(schedule, x0: jax.Array, x_t: jax.Array, t: jax.Array, s: jax.Array):
    """Mean [B, ...] and variance (t's shape) of q(x_s | x_t, x_0), 0 <= s < t."""
    alpha_t, sigma_t = schedule.alpha_sigma(t)
    alpha_s, sigma_s = schedule.alpha_sigma(s)
    w_x, w_0, variance, _ = coefficients(schedule.log_snr(t), schedule.log_snr(s), alpha_t, alpha_s, sigma_t, sigma_s)
    return per_sample(w_x, x_t) * x_t + per_sample(w_0, x0) * x0, variance


def posterior_log_variances(schedule: Discrete, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log beta~_t and log beta_t, the bounds a learned variance moves between (Nichol & Dhariwal 2021, eq. 15).

    beta~_0 is zero, so its logarithm is that of beta~_1, as in the authors' code. t: integers, [B].
    """
    beta = schedule.betas
    bar = schedule.alpha_bar
    tilde = beta[1:] * (1 - bar[:-1]) / (1 - bar[1:])
    low = jnp.asarray(np.log(np.concatenate([tilde[:1], tilde])), jnp.float32)
    high = jnp.asarray(np.log(beta), jnp.float32)
    return low[t], high[t]


def normal_kl(mean1, log_var1, mean2, log_var2):
    """KL(N(mean1, exp log_var1) || N(mean2, exp log_var2)) elementwise, in nats; shapes must agree."""
    return 0.5 * (
        log_var2 - log_var1 - 1.0 + jnp.exp(log_var1 - log_var2) + jnp.square(mean1 - mean2) * jnp.exp(-log_var2)
    )


def discretized_gaussian_nll(x0: jax.Array, mean: jax.Array, log_var: jax.Array) -> jax.Array:
    """-log of the mass that N(mean, exp log_var) puts on x0's 8-bit bin, elementwise, in nats (DDPM, eq. 13).

    x0 in [-1, 1] on the grid k/127.5 - 1; the bins are 1/127.5 wide on either side and open at the two ends.
    """
    inv_std = jnp.exp(-0.5 * log_var)
    upper, lower = inv_std * (x0 - mean + 1 / 255), inv_std * (x0 - mean - 1 / 255)
    log_cdf = jax.scipy.stats.norm.logcdf
    # log(Phi(u) - Phi(l)) from the smaller tail, where the difference keeps its digits.
    flip = lower > 0
    hi, lo = jnp.where(flip, -lower, upper), jnp.where(flip, -upper, lower)
    log_hi, log_lo = log_cdf(hi), log_cdf(lo)
    inner = log_hi + jnp.log1p(-jnp.exp(jnp.minimum(log_lo - log_hi, -1e-7)))
    log_mass = jnp.where(x0 < -0.999, log_cdf(upper), jnp.where(x0 > 0.999, log_cdf(-lower), inner))
    return -log_mass
