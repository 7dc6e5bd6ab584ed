"""Loss weightings as functions of lambda = log SNR.

All are stated for the error in x_0 space, w(lambda) |x_0 - x_0_hat|^2; the process multiplies by c_out^2 to
reach the space its network predicts in (parameterization.py), so one line here serves every prediction type.
"simple" alone is a statement about the prediction space: weight one there, whatever it is.

    simple         1 in prediction space                    Ho et al. 2020, eq. 14
    min_snr        min(SNR, gamma)                          Hang et al. 2023, eq. 5-6
    p2             SNR / (k + SNR)^gamma                    Choi et al. 2022, eq. 8
    edm            (s^2 + s_d^2) / (s s_d)^2, s^2 = 1/SNR   Karras et al. 2022, table 1
    v              SNR + 1                                  Salimans & Ho 2022, section 4
    truncated_snr  max(SNR, 1)                              Salimans & Ho 2022, section 4
    elbo           SNR (-dlambda/dt) / 2                    Kingma et al. 2021, eq. 17-18, in nats
    sigmoid        the same times sigmoid(bias - lambda)    Kingma & Gao 2023; Hoogeboom et al. 2024
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_diffusion.errors import check_options, choose

# (lambda, -dlambda/dt) -> weight of |x_0 - x_0_hat|^2, elementwise. None stands for "simple".
Weighting = Callable[[jax.Array, jax.Array], jax.Array]


def min_snr(gamma: float = 5.0) -> Weighting:
    return lambda l, rate: jnp.exp(jnp.minimum(l, jnp.log(gamma)))


def p2(gamma: float = 1.0, k: float = 1.0) -> Weighting:
    return lambda l, rate: jnp.exp(l - gamma * jnp.logaddexp(l, jnp.log(k)))


def edm(sigma_data: float = 0.5) -> Weighting:
    return lambda l, rate: jnp.exp(l) + 1 / sigma_data**2


def v() -> Weighting:
    return lambda l, rate: jnp.exp(l) + 1


def truncated_snr() -> Weighting:
    return lambda l, rate: jnp.exp(jnp.maximum(l, 0.0))


def elbo() -> Weighting:
    return lambda l, rate: _times_rate(0.5 * jnp.exp(l), rate)


def sigmoid(bias: float = 2.0) -> Weighting:
    return lambda l, rate: _times_rate(0.5 * jnp.exp(l + jax.nn.log_sigmoid(bias - l)), rate)


def _times_rate(w: jax.Array, rate: jax.Array) -> jax.Array:
    """w rate, and 0 where the signal is gone: lambda falls without end there, its SNR all the same."""
    return w * jnp.where(w > 0, rate, 0.0)


WEIGHTINGS: dict[str, Callable[..., Any]] = {
    "simple": lambda: None,
    "min_snr": min_snr,
    "p2": p2,
    "edm": edm,
    "v": v,
    "truncated_snr": truncated_snr,
    "elbo": elbo,
    "sigmoid": sigmoid,
}


def make(name: str, **options) -> Weighting | None:
    """The weighting called `name` in WEIGHTINGS; None means weight one in prediction space."""
    choose("weighting", name, WEIGHTINGS)
    check_options(f"weighting {name!r}", WEIGHTINGS[name], options)
    return WEIGHTINGS[name](**options)
