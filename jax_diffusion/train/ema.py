"""Averages of the weights over training: the exponential one, and power-function ones (EDM2).

A power-function average weighs the weights at time s by s^gamma until now, t: its width grows with the training.
That width, the standard deviation of the normalised profile over t, names it (Karras et al. 2024, eq. 121-127):

    p_t(s) = (gamma + 1) s^gamma / t^(gamma + 1),   std^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))       (1)
    average_t = beta average_(t-1) + (1 - beta) weights_t,   beta = (1 - 1/t)^(gamma + 1)                    (2)
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

WIDEST = 12**-0.5  # the std of gamma = 0, the mean of all weights


def decay_at(step: jax.Array, decay: float, warmup: bool = True) -> jax.Array:
    """The decay of update number `step` (from 0): min(decay, (1 + n) / (10 + n)) with warm-up.

    Without one, a decay of 0.9999 still holds 37 % of the random initialisation after 10,000 steps.
    """
    n = step.astype(jnp.float32)
    return jnp.minimum(decay, (1 + n) / (10 + n)) if warmup else jnp.float32(decay)


def update(ema: Any, params: Any, decay: jax.Array) -> Any:
    """ema + (1 - decay) (params - ema), once per optimizer step, float32."""
    return jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), ema, params)


def gamma_of(std: float) -> float:
    """The exponent of the profile of relative width `std`, in (0, WIDEST): the largest root of eq. 1 as a cubic."""
    s = float(std) ** -2
    return float(np.roots([1, 7, 16 - s, 12 - s]).real.max())


def std_of(gamma: float) -> float:
    """The relative width of the profile with exponent `gamma`."""
    return float(np.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))))


def power_rate(step: jax.Array, gamma: float) -> jax.Array:
    """1 - beta of update number `step` (from 0), which is t = step + 1 in eq. 2.

    Computed by logarithms: late in training beta itself rounds to 1.
    """
    return -jnp.expm1((gamma + 1) * jnp.log1p(-1 / (step.astype(jnp.float32) + 1)))


def update_powers(averages: tuple, params: Any, step: jax.Array, gammas: tuple[float, ...]) -> tuple:
    """The averages of eq. 2 after update number `step`, one for each exponent."""
    rates = [power_rate(step, gamma) for gamma in gammas]
    return tuple(
        jax.tree.map(lambda a, p, rate=rate: a + rate * (p - a), average, params)
        for average, rate in zip(averages, rates, strict=True)
    )
