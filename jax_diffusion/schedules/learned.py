"""A schedule that is trained: VDM's monotone network."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jax_diffusion.schedules.base import Array, Schedule, namespace


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Learned(Schedule):
    """VDM's learned schedule: a monotone network between two learned ends (Kingma et al. 2021, app. H).

    gamma(t) = w1 t + sum_k w3_k sigmoid(w2_k t + b_k), w1, w2, w3 >= 0 by softplus, then rescaled so that
    lambda = -gamma runs from ends[0] at t=0 to ends[1] at t=1. A pytree: differentiate with respect to it.
    """

    ends: jax.Array  # [2]: lambda(0), lambda(1)
    w1: jax.Array  # []
    w2: jax.Array  # [K]
    w3: jax.Array  # [K]
    b: jax.Array  # [K]
    scaling = "vp"
    t_min = 0.0
    t_max = 1.0

    @staticmethod
    def init(key: jax.Array, features: int = 64, log_snr_max: float = 13.3, log_snr_min: float = -10.0):
        k2, k3, kb = jax.random.split(key, 3)
        return Learned(
            ends=jnp.array([log_snr_max, log_snr_min], jnp.float32),
            w1=jnp.array(1.0, jnp.float32),
            w2=jax.random.normal(k2, (features,), jnp.float32),
            w3=jax.random.normal(k3, (features,), jnp.float32) - 4.0,  # starts near linear
            b=jax.random.normal(kb, (features,), jnp.float32),
        )

    def _gamma(self, t: jax.Array) -> jax.Array:
        w2, w3, b = (w.reshape((1,) * t.ndim + (-1,)) for w in (self.w2, self.w3, self.b))
        bumps = jax.nn.softplus(w3) * jax.nn.sigmoid(t[..., None] * jax.nn.softplus(w2) + b)
        return jax.nn.softplus(self.w1) * t + jnp.sum(bumps, -1)

    def log_snr(self, t: Array) -> Array:
        xp, _ = namespace(t)
        out = _log_snr(self, jnp.asarray(t, jnp.float32))
        return out if xp is jnp else np.asarray(out, np.float64)

    def inverse(self, log_snr: Array) -> Array:
        """By bisection: 40 halvings reach float32's last bit."""
        xp, l = namespace(log_snr)
        lo, hi = xp.zeros_like(l), xp.ones_like(l)
        for _ in range(40):
            mid = (lo + hi) / 2
            above = self.log_snr(mid) > l
            lo, hi = xp.where(above, mid, lo), xp.where(above, hi, mid)
        return (lo + hi) / 2


@jax.jit  # an inverse asks 40 times, a solver's table for dozens of inverses: operation by operation that took seconds
def _log_snr(schedule: Learned, t: jax.Array) -> jax.Array:
    g, g0, g1 = schedule._gamma(t), schedule._gamma(jnp.zeros(())), schedule._gamma(jnp.ones(()))
    return schedule.ends[0] + (schedule.ends[1] - schedule.ends[0]) * (g - g0) / (g1 - g0)
