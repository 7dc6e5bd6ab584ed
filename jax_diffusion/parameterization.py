"""What the network predicts, as two numbers.

Every prediction type in use is a linear mix of clean sample and noise,

    target = a(t) x_0 + b(t) eps,                                                         (1)

so with x_t = alpha x_0 + sigma eps both are recovered by a 2x2 solve:

    x_0 = (sigma target - b x_t) / d,    eps = (a x_t - alpha target) / d,    d = a sigma - b alpha   (2)

    x0       (1, 0)                epsilon  (0, 1)               Ho et al. 2020
    v        (-sigma, alpha)       flow     (alpha', sigma')     Salimans & Ho 2022; Lipman et al. 2022
    score    (0, -1/sigma)         edm      ((1 - c_skip) / c_out, -c_skip (sigma/alpha) / c_out)

which is c_skip = -b/d and c_out = sigma/d in EDM's notation (Karras et al. 2022, eq. 7):

    x_0_hat = c_skip x_t + c_out F(c_in x_t; c_noise).                                    (3)

|x_0 - x_0_hat|^2 = c_out^2 |F - target|^2 converts any loss space into any other.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jax_diffusion.errors import UserError, choose
from jax_diffusion.schedules import Schedule
from jax_diffusion.shapes import per_sample

PREDICTIONS = ("x0", "epsilon", "v", "flow", "score", "edm")


@dataclasses.dataclass(frozen=True)
class Parameterization:
    """A prediction type on a schedule. Times t are [] or [B] JAX arrays; samples are [B, ...].

    sigma_data: standard deviation of the data, used by "edm" alone (0.5 for images in [-1, 1]).
    raw_inputs: the network is shown x_t as it is and, on variance-exploding schedules, sigma itself (Song et al. 2021).
    """

    prediction: str
    schedule: Schedule
    sigma_data: float = 0.5
    raw_inputs: bool = False

    def __post_init__(self):
        choose("prediction", self.prediction, PREDICTIONS)
        schedule = self.schedule
        # Training visits the last integer, where eq. 2 divides by alpha unless x_0 is part of the target.
        if schedule.steps and self.prediction in ("epsilon", "score", "edm") and schedule.alpha(schedule.t_max) == 0:
            raise UserError(
                f"prediction={self.prediction!r} cannot be learned with zero terminal SNR: at the last timestep "
                "nothing is left of x_0 to recover; choose v, x0 or flow"
            )

    def mix(self, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(a, b) of eq. 1, each of t's shape."""
        alpha, sigma = self.schedule.alpha_sigma(t)
        zero, one = jnp.zeros_like(sigma), jnp.ones_like(sigma)
        match self.prediction:
            case "x0":
                return one, zero
            case "epsilon":
                return zero, one
            case "v":
                return -sigma, alpha
            case "score":
                return zero, -1 / sigma
            case "flow":
                return self.schedule.alpha_sigma_rate(t)
            case "edm":
                # In the variance-exploding frame x_t / alpha the noise level is s = sigma / alpha.
                s, sd = sigma / alpha, self.sigma_data
                c_skip = sd**2 / (s**2 + sd**2)
                c_out = s * sd / jnp.sqrt(s**2 + sd**2)
                return (1 - c_skip) / c_out, -c_skip * s / c_out
        raise AssertionError(self.prediction)

    def _solve(self, t):
        alpha, sigma = self.schedule.alpha_sigma(t)
        a, b = self.mix(t)
        return alpha, sigma, a, b, a * sigma - b * alpha

    def c_in(self, t: jax.Array) -> jax.Array:
        """What x_t is multiplied by before the network sees it: unit variance where the schedule has not."""
        alpha, sigma = self.schedule.alpha_sigma(t)
        if self.raw_inputs:
            return jnp.ones_like(sigma)
        if self.prediction == "edm":
            return 1 / jnp.sqrt((alpha * self.sigma_data) ** 2 + sigma**2)
        if self.schedule.scaling == "ve":
            return 1 / jnp.sqrt(self.sigma_data**2 + sigma**2)
        return jnp.ones_like(sigma)

    def c_noise(self, t: jax.Array) -> jax.Array:
        """The number the network is conditioned on: the timestep itself (discrete), 1000 t (continuous),
        log(sigma) / 4 (EDM's and other variance-exploding ones)."""
        if self.schedule.steps:
            return t
        if self.schedule.scaling == "ve":
            return self.schedule.alpha_sigma(t)[1] if self.raw_inputs else -self.schedule.log_snr(t) / 8
        return 1000.0 * t

    def c_skip(self, t: jax.Array) -> jax.Array:
        _, _, _, b, d = self._solve(t)
        return -b / d

    def c_out(self, t: jax.Array) -> jax.Array:
        _, sigma, _, _, d = self._solve(t)
        return sigma / d

    def target(self, x0: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
        """Eq. 1: what the network should say, [B, ...]."""
        a, b = self.mix(t)
        return per_sample(a, x0) * x0 + per_sample(b, x0) * eps

    def x0(self, prediction: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
        """Eq. 2: the clean sample a prediction stands for, [B, ...]."""
        _, sigma, _, b, d = self._solve(t)
        return per_sample(sigma / d, x_t) * prediction - per_sample(b / d, x_t) * x_t

    def eps(self, prediction: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
        """Eq. 2: the noise a prediction stands for, [B, ...]."""
        alpha, _, a, _, d = self._solve(t)
        return per_sample(a / d, x_t) * x_t - per_sample(alpha / d, x_t) * prediction
