"""The variational bound on -log p(x_0), in bits per dimension: what a chain of reverse steps needs to transmit x_0.

In discrete time (DDPM, eq. 5)

    L = KL(q(x_T | x_0) || p(x_T)) + sum_{t > s >= 0} KL(q(x_s | x_t, x_0) || p(x_s | x_t)) - log p(x_0 | x_0th)    (1)

and for infinitely many steps (Kingma et al. 2021, eq. 11, with lambda = log SNR as the variable, eq. 18)

    L = KL(q(x_T | x_0) || p(x_T)) + 1/2 int E|eps - eps_hat|^2 dlambda - log p(x_0 | x_tmin)                       (2)

whose middle term depends on no schedule but through the ends of lambda.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_diffusion.errors import UserError, choose
from jax_diffusion.guidance import Denoiser, unpack
from jax_diffusion.posterior import LOG_2PI, coefficients, discretized_gaussian_nll, normal_kl
from jax_diffusion.schedules import Discrete, Schedule, alpha_sigma_from_log_snr
from jax_diffusion.shapes import mean_per_sample, per_sample
from jax_diffusion.solvers import grids, noise

LEVELS = np.arange(256) / 127.5 - 1  # of 8-bit images
VARIANCES = ("fixed_small", "fixed_large", "learned")
LN2 = math.log(2)


class Bound(NamedTuple):
    """All in bits per dimension (with discretized=False, of a density: they may be negative)."""

    total: jax.Array  # [B]
    prior: jax.Array  # [B]
    terms: jax.Array  # [S, B], at the S times in increasing order; the first is the decoder's


class ContinuousBound(NamedTuple):
    """All [B], in bits per dimension."""

    total: jax.Array
    prior: jax.Array
    diffusion: jax.Array
    reconstruction: jax.Array


def variational_bound(
    key: jax.Array,
    denoise: Denoiser,
    schedule: Discrete,
    x0: jax.Array,
    *,
    variance: str = "fixed_small",
    steps: int | None = None,
    indices: jax.Array | None = None,
    discretized: bool = True,
) -> Bound:
    """Eq. 1 with one draw of x_t a term.

    Args:
      x0:       [B, ...], on the 8-bit grid in [-1, 1] where discretized.
      variance: of the reverse steps: fixed_small (beta~), fixed_large (beta) or learned (between them, by the
                denoiser's v). The decoder of the fixed ones has the second step's beta~, as in DDPM's code.
      steps:    None is all T; S is the chain through S evenly spread times, ends included, one evaluation each.
      indices:  [B] numbers of the samples, which with the key decide their noise; None is 0..B-1.
      discretized: the decoder gives probabilities to 8-bit values (DDPM, eq. 13); else a density, for continuous data.
    """
    if not schedule.steps:
        raise UserError("variational_bound needs a discrete schedule: use continuous_bound")
    choose("variance", variance, VARIANCES)
    t = _times(schedule, steps)
    rows = _rows(schedule, t, variance)
    indices = jnp.arange(len(x0)) if indices is None else jnp.asarray(indices)
    keys = noise.sample_keys(key, indices)
    x0 = x0.astype(jnp.float32)

    def term(n, row):
        x_t = row["alpha"] * x0 + row["sigma"] * noise.normal(keys, n, x0.shape[1:])
        out = unpack(denoise(x_t, row["t"]))
        D, log_var = out.x0.astype(jnp.float32), jnp.broadcast_to(row["log_var"], x0.shape)
        if variance == "learned":
            if out.v is None:
                raise UserError("variance='learned': this denoiser has learned none; use fixed_small or fixed_large")
            log_var = out.v * row["high"] + (1 - out.v) * row["low"]

        def decoder():
            return discretized_gaussian_nll(x0, D, log_var) if discretized else _normal_nll(x0, D, log_var)

        def transition():
            # Both means hold the same share of x_t.
            low = jnp.broadcast_to(row["low"], x0.shape)
            return normal_kl(row["w_0"] * x0, low, row["w_0"] * D, log_var)

        return n + 1, mean_per_sample(jax.lax.cond(n == 0, decoder, transition)) / LN2

    _, terms = jax.lax.scan(term, jnp.int32(0), jax.tree.map(lambda c: jnp.asarray(c, jnp.float32), rows))
    prior = _prior(schedule, x0, *schedule.alpha_sigma(t[-1]))
    return Bound(prior + jnp.sum(terms, axis=0), prior, terms)


def _times(schedule: Discrete, steps: int | None) -> np.ndarray:
    """The S times in increasing order, from 0 to T - 1."""
    steps = schedule.steps if steps is None else steps
    if steps < 2:
        raise UserError(f"steps={steps} is no chain: give 2 to {schedule.steps}, or None for all")
    return grids.times(schedule, steps, "linspace")[::-1]


def _rows(schedule: Discrete, t: np.ndarray, variance: str) -> dict[str, np.ndarray]:
    """The numbers of each transition, float64 [S]: the step to x_0 itself comes first."""
    l, (alpha, sigma) = schedule.log_snr(t), schedule.alpha_sigma(t)
    _, w_0, small, large = coefficients(l[1:], l[:-1], alpha[1:], alpha[:-1], sigma[1:], sigma[:-1], xp=np)
    # The step to x_0 has no posterior variance; that of the step before it stands in. Its transition's is sigma^2.
    low = np.log(np.concatenate([small[:1], small]))
    high = np.log(np.concatenate([sigma[:1] ** 2, large]))
    fixed_large = np.concatenate([low[:1], high[1:]])
    return {
        "t": t,
        "alpha": alpha,
        "sigma": sigma,
        "w_0": np.concatenate([[1.0], w_0]),
        "low": low,
        "high": high,
        "log_var": fixed_large if variance == "fixed_large" else low,
    }


def continuous_bound(
    key: jax.Array,
    denoise: Denoiser,
    schedule: Schedule,
    x0: jax.Array,
    *,
    times: int = 32,
    indices: jax.Array | None = None,
    discretized: bool = True,
) -> ContinuousBound:
    """Eq. 2, the integral by `times` draws for each sample, one in each of as many equal strata of lambda.

    For any schedule (a discrete one is interpolated); lambda goes from that of t_min, at most 20, to that of t_max, at
    least -20. The decoder needs no network: p(x_0 | x_tmin) is q(x_tmin | x_0) normalised over the 256 values of a
    pixel (Kingma et al. 2021, eq. 35-36), or with discretized=False the density N(x / alpha, sigma^2 / alpha^2).
    The rest as in variational_bound.
    """
    if times < 1:
        raise UserError(f"times={times} is too few: give at least 1")
    indices = jnp.arange(len(x0)) if indices is None else jnp.asarray(indices)
    keys = noise.sample_keys(key, indices)
    x0 = x0.astype(jnp.float32)
    most, least = (float(schedule.log_snr(np.float64(t))) for t in (schedule.t_min, schedule.t_max))
    most, least = min(most, 20.0), max(least, -20.0)
    strata = (most - least) / times
    # One shift for all strata of a sample, as in the paper's antithetic times (app. I.1).
    shift = jax.vmap(jax.random.uniform)(keys)

    def term(n, _):
        log_snr = most - strata * (n + shift)
        t = jnp.clip(schedule.inverse(log_snr), schedule.t_min, schedule.t_max)
        x_t, _ = _noised(keys, n + 1, x0, log_snr, schedule.scaling)
        D = unpack(denoise(x_t, t)).x0.astype(jnp.float32)
        return n + 1, strata * 0.5 * jnp.exp(log_snr) * mean_per_sample(jnp.square(x0 - D)) / LN2

    _, diffusion = jax.lax.scan(term, jnp.int32(0), None, length=times)
    diffusion = jnp.sum(diffusion, axis=0)
    z, (alpha, sigma) = _noised(keys, 0, x0, jnp.float32(most), schedule.scaling)
    z, std = z / alpha, sigma / alpha
    if discretized:
        reconstruction = jax.lax.map(lambda zx: _categorical_nll(zx[0], zx[1], std), (z, x0))
    else:
        reconstruction = _normal_nll(x0, z, jnp.broadcast_to(2 * jnp.log(std), x0.shape))
    reconstruction = mean_per_sample(reconstruction) / LN2
    prior = _prior(schedule, x0, *alpha_sigma_from_log_snr(np.float64(least), schedule.scaling))
    return ContinuousBound(prior + diffusion + reconstruction, prior, diffusion, reconstruction)


def _noised(keys, n, x0, log_snr, scaling):
    alpha, sigma = alpha_sigma_from_log_snr(log_snr, scaling)
    eps = noise.normal(keys, n, x0.shape[1:])
    return per_sample(alpha, x0) * x0 + per_sample(sigma, x0) * eps, (alpha, sigma)


def _prior(schedule: Schedule, x0: jax.Array, alpha: float, sigma: float) -> jax.Array:
    """KL(q(x_T | x_0) || N(0, prior_scale^2)), [B]."""
    variance = float(sigma / schedule.prior_scale) ** 2
    fixed = 0.5 * (variance - 1 - math.log(variance))  # in float64: it is a difference of nearly equal numbers
    return (fixed + 0.5 * float(alpha / schedule.prior_scale) ** 2 * mean_per_sample(jnp.square(x0))) / LN2


def _normal_nll(x, mean, log_var):
    return 0.5 * (LOG_2PI + log_var + jnp.square(x - mean) * jnp.exp(-log_var))


def _categorical_nll(z: jax.Array, x0: jax.Array, std: jax.Array) -> jax.Array:
    """-log of x0's share among the 256 values a pixel may have, each weighted by N(z; value, std^2)."""
    levels = jnp.asarray(LEVELS, jnp.float32).reshape((1,) * z.ndim + (-1,))
    own = -0.5 * jnp.square((z - x0) / std)
    return jax.nn.logsumexp(-0.5 * jnp.square((z[..., None] - levels) / std), axis=-1) - own
