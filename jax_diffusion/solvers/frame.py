"""The probability-flow ODE with the logarithm of the noise level as its time, for methods that choose their own steps.

In the straight frame y = x / s of Grid.frame it is dy/du = (y - D) / u on every schedule. With w = log u,

    dy/dw = y - D(s(w) y, t(w)),                                                          (1)

nothing is divided by a small u, and a Runge-Kutta pair needs half the evaluations that it needs in u itself (measured
on mixtures of Gaussians, u from 80 to 0.002). A network is conditioned on t, so t(w) is taken inside the compiled
program from the schedule's own inverse.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jax_diffusion.guidance import Denoiser, unpack
from jax_diffusion.schedules import Schedule, alpha_sigma_from_log_snr
from jax_diffusion.shapes import per_sample

LEAST_NOISE = 20.0  # lambda at which integration ends on schedules that go on to sigma = 0, as in solvers/grids.py


@dataclasses.dataclass(frozen=True)
class Frame:
    """w = log(sigma / alpha) with s = alpha; where alpha reaches zero, log(sigma / (alpha + sigma)), s = alpha + sigma.

    Hashable, so that solvers may hold it as part of a program rather than as data.
    """

    schedule: Schedule
    bounded: bool  # the second of the two: u <= 1

    @staticmethod
    def of(schedule: Schedule) -> "Frame":
        return Frame(schedule, schedule.scaling == "flow" or float(schedule.alpha(np.float64(schedule.t_max))) == 0)

    def w(self, t: float) -> float:
        """log u at time t, in float64."""
        alpha, sigma = self.schedule.alpha_sigma(np.float64(t))
        return float(np.log(sigma / (alpha + sigma) if self.bounded else sigma / alpha))

    @property
    def last_time(self) -> float:
        """The least noisy time of the schedule that has noise."""
        return max(self.schedule.t_min, float(self.schedule.inverse(np.float64(LEAST_NOISE))))

    def log_snr(self, w: jax.Array) -> jax.Array:
        """lambda at log u = w; -infinity where alpha is zero."""
        return 2 * (jnp.log(-jnp.expm1(w)) - w) if self.bounded else -2 * w

    def point(self, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(t, s) at log u = w, each of w's shape."""
        log_snr = self.log_snr(jnp.minimum(w, 0) if self.bounded else w)
        t = jnp.clip(self.schedule.inverse(log_snr), self.schedule.t_min, self.schedule.t_max)
        alpha, sigma = alpha_sigma_from_log_snr(log_snr, self.schedule.scaling)
        return t, alpha + sigma if self.bounded else alpha

    def denoised(self, denoise: Denoiser, y: jax.Array, w: jax.Array) -> jax.Array:
        """D of y [B, ...] at log u = w [] or [B]."""
        t, s = self.point(w)
        return unpack(denoise(per_sample(s, y) * y, t)).x0
