"""Guidance by a gradient: whatever says how likely y is turns an unconditional denoiser into one given y.

The score of p(x_t | y) is that of p(x_t) plus grad log p(y | x_t), and score = (alpha x0_hat - x_t) / sigma^2, so

    x0_hat(x_t, y) = x0_hat(x_t) + (sigma^2 / alpha) grad log p(y | x_t).                     (1)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jax_diffusion.guidance.denoisers import Denoised, Denoiser, unpack
from jax_diffusion.schedules import Schedule
from jax_diffusion.shapes import per_sample

LogProb = Callable[[jax.Array, jax.Array], jax.Array]  # (x [B, ...], t [] or [B]) -> [B]


def classifier(denoise: Denoiser, log_prob: LogProb, schedule: Schedule, scale: jax.Array | float = 1.0) -> Denoiser:
    """Eq. 1 with log p(y | x_t, t) of a classifier trained on noisy images (Dhariwal & Nichol 2021, section 4.2).

    log_prob: (x_t, t) -> [B], differentiable in x_t; y is inside.  scale: a number or one per sample [B].
    """

    def guided(x, t):
        gradient = jax.grad(lambda x: jnp.sum(log_prob(x, t)))(x)
        return _shifted(unpack(denoise(x, t)), gradient, x, t, schedule, scale)

    return guided


def reconstruction(
    denoise: Denoiser, log_prob: LogProb, schedule: Schedule, scale: jax.Array | float = 1.0
) -> Denoiser:
    """Eq. 1 with log p(y | x_t) taken to be log p(y | x0_hat(x_t), t): needs no training on noisy images.

    log_prob: (x0_hat, t) -> [B]: a likelihood of clean images, as in reconstruction guidance (Ho et al. 2022, Video
    diffusion models, section 3.1) and DPS (Chung et al. 2023), or one widened by what x0_hat leaves open at
    time t (Song et al. 2023, Pseudoinverse-guided diffusion), which is exact where everything is Gaussian.
    The gradient goes through the denoiser: about three times the cost of one evaluation.
    """

    def guided(x, t):
        def likelihood(x):
            out = unpack(denoise(x, t))
            return jnp.sum(log_prob(out.x0, t)), out

        gradient, out = jax.grad(likelihood, has_aux=True)(x)
        return _shifted(out, gradient, x, t, schedule, scale)

    return guided


def _shifted(out: Denoised, gradient: jax.Array, x, t, schedule: Schedule, scale) -> Denoised:
    alpha, sigma = schedule.alpha_sigma(jnp.asarray(t, jnp.float32))
    # Where alpha is 0 (a flow's first point) x_t says nothing of y: no shift.
    weight = jnp.where(alpha > 0, sigma**2 / jnp.where(alpha > 0, alpha, 1.0), 0.0)
    shift = per_sample(scale, x) * per_sample(weight, x) * gradient
    return out._replace(x0=out.x0 + shift, raw=None if out.raw is None else out.raw + shift)
