"""The forward process: the only place that knows Gaussian from discrete.

A process says how a clean sample is destroyed, what the network is shown and asked for, and what its answer
means. The trainer and the sampler use these five functions and know no more.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jax_diffusion import posterior as post
from jax_diffusion import weighting as weightings
from jax_diffusion.errors import UserError
from jax_diffusion.parameterization import Parameterization
from jax_diffusion.schedules import Discrete, Schedule
from jax_diffusion.shapes import mean_per_sample, per_sample
from jax_diffusion.weighting import Weighting


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """x_t = alpha(t) x_0 + sigma(t) eps.

    learn_variance: the network's channels double; the second half moves log sigma^2 of the reverse step
        between beta~ and beta, and the loss gains vlb_weight * L_vlb (Nichol & Dhariwal 2021, eq. 15-16).
        L_vlb is the *sum* over the T terms, estimated as T times the drawn one, in bits.
    """

    parameterization: Parameterization
    weighting: Weighting | None = None
    learn_variance: bool = False
    vlb_weight: float = 0.001

    def __post_init__(self):
        if self.learn_variance and not isinstance(self.schedule, Discrete):
            raise UserError(
                "process.learn_variance=True needs a discrete schedule (linear, cosine, ...): "
                "a continuous one has no single reverse step whose variance could be learned"
            )

    @property
    def schedule(self) -> Schedule:
        return self.parameterization.schedule

    def prior(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """What sampling starts from at t_max, float32 of `shape`."""
        return self.schedule.prior_scale * jax.random.normal(key, shape, jnp.float32)

    def q_sample(self, key: jax.Array, x0: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Draws x_t given x_0 ([B, ...] in [-1, 1]) at times t ([B] or []). Returns (x_t, target)."""
        eps = jax.random.normal(key, x0.shape, x0.dtype)
        alpha, sigma = self.schedule.alpha_sigma(t)
        x_t = per_sample(alpha, x0) * x0 + per_sample(sigma, x0) * eps
        return x_t, self.parameterization.target(x0, eps, t)

    def network_inputs(self, x_t: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(c_in x_t, c_noise [B]): what the network is shown."""
        t = jnp.broadcast_to(t, x_t.shape[:1])
        return per_sample(self.parameterization.c_in(t), x_t) * x_t, self.parameterization.c_noise(t)

    def split(self, prediction: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """The prediction and, where the variance is learned, its place in [0, 1] between beta~ and beta."""
        if not self.learn_variance:
            return prediction, None
        mean, v = jnp.split(prediction, 2, axis=-1)
        return mean, (v + 1) / 2

    def loss_weight(self, t: jax.Array) -> jax.Array:
        """The weight of |prediction - target|^2 at time t, of t's shape."""
        if self.weighting is None:
            return jnp.ones_like(t)
        w = self.weighting(self.schedule.log_snr(t), -self.schedule.log_snr_rate(t))
        return w * jnp.square(self.parameterization.c_out(t))

    def loss(self, prediction: jax.Array, target: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
        """The weighted error of each sample, averaged over its elements: [B], float32."""
        prediction, v = self.split(prediction)
        error = jnp.square(prediction.astype(jnp.float32) - target)
        loss = self.loss_weight(t) * mean_per_sample(error)
        if v is not None:
            assert self.schedule.steps is not None  # a learned variance is of a discrete schedule
            # The bound trains the variance alone: the mean keeps the simple loss's gradient.
            x0 = self.parameterization.x0(target, x_t, t)
            bound = self.vlb_term(x0, jax.lax.stop_gradient(prediction), v, x_t, t)
            loss = loss + self.vlb_weight * self.schedule.steps * bound
        return loss

    def vlb_term(self, x0, prediction, v, x_t, t) -> jax.Array:
        """L_t of DDPM's eq. 5 with a learned variance, in bits per dimension, [B].

        The decoder term at t = 0, the KL of the two reverse transitions above it.
        """
        x0_hat = self.parameterization.x0(prediction, x_t, t)
        s = jnp.maximum(t - 1, 0)
        mean, _ = post.posterior(self.schedule, x0, x_t, t, s)
        mean_hat, _ = post.posterior(self.schedule, x0_hat, x_t, t, s)
        first = per_sample(t == 0, x0) > 0
        # At t = 0 the step lands on x_0 itself: the decoder's mean is x0_hat.
        mean_hat = jnp.where(first, x0_hat, mean_hat)
        schedule: Any = self.schedule  # discrete, see __init__
        low, high = (per_sample(c, x0) for c in post.posterior_log_variances(schedule, t.astype(int)))
        log_var = v * high + (1 - v) * low
        kl = post.normal_kl(mean, jnp.broadcast_to(low, x0.shape), mean_hat, log_var)
        nll = post.discretized_gaussian_nll(x0, mean_hat, log_var)
        return mean_per_sample(jnp.where(first, nll, kl)) / jnp.log(2.0)

    def denoised(self, prediction: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
        """x0_hat, [B, ...] float32: what a prediction made at (x_t, t) says of the clean sample."""
        prediction, _ = self.split(prediction)
        return self.parameterization.x0(prediction.astype(jnp.float32), x_t, t)


def make(
    schedule: Schedule,
    prediction: str = "epsilon",
    weighting: str = "simple",
    *,
    learn_variance: bool = False,
    sigma_data: float = 0.5,
    raw_inputs: bool = False,
    **weighting_options,
) -> Gaussian:
    """A Gaussian process from names: `make(schedules.make("cosine"), "v", "min_snr", gamma=5.0)`."""
    if weighting == "edm":
        weighting_options.setdefault("sigma_data", sigma_data)
    return Gaussian(
        Parameterization(prediction, schedule, sigma_data, raw_inputs),
        weightings.make(weighting, **weighting_options),
        learn_variance,
    )
