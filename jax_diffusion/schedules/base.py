"""What every schedule shares: lambda(t), a scaling, and the pair (alpha, sigma) they fix."""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import expit, log_expit

from jax_diffusion.errors import UserError

Array = Any  # np.ndarray or jax.Array


def is_jax(x) -> bool:
    return isinstance(x, jax.Array)


def namespace(x):
    """The array module of `x`, and `x` as an array of it (float64 in NumPy, float32 in JAX)."""
    return (jnp, jnp.asarray(x, jnp.float32)) if is_jax(x) else (np, np.asarray(x, np.float64))


def sigmoid(x: Array) -> Array:
    return jax.nn.sigmoid(x) if is_jax(x) else expit(x)


def log_sigmoid(x: Array) -> Array:
    return jax.nn.log_sigmoid(x) if is_jax(x) else log_expit(x)


def alpha_sigma_from_log_snr(log_snr: Array, scaling: str) -> tuple[Array, Array]:
    """The (alpha, sigma) of a scaling with alpha^2/sigma^2 = exp(log_snr); exact at +-infinity."""
    xp, l = namespace(log_snr)
    if scaling == "vp":
        return xp.sqrt(sigmoid(l)), xp.sqrt(sigmoid(-l))
    if scaling == "flow":
        return sigmoid(l / 2), sigmoid(-l / 2)
    if scaling == "ve":
        return xp.ones_like(l), xp.exp(-l / 2)
    if scaling == "subvp":
        # alpha / (1 - alpha^2) = r, solved for alpha without cancellation (r <= 1: small alpha).
        r = xp.exp(xp.minimum(l / 2, 40.0))
        alpha = 2 * r / (1 + xp.sqrt(1 + 4 * r * r))
        return alpha, alpha / r
    raise UserError(f"scaling={scaling!r} is unknown: choose one of vp, subvp, ve, flow")


@dataclasses.dataclass(frozen=True)
class Schedule(abc.ABC):
    """lambda(t), its inverse, and a scaling. `t_min` and `t_max` bound the times a model is trained on."""

    @property
    @abc.abstractmethod
    def scaling(self) -> str:
        """One of vp, subvp, ve, flow."""

    @property
    @abc.abstractmethod
    def t_min(self) -> float: ...

    @property
    @abc.abstractmethod
    def t_max(self) -> float: ...

    @property
    def steps(self) -> int | None:
        """How many integer times a discrete schedule has; None where time is continuous."""
        return None

    @abc.abstractmethod
    def log_snr(self, t: Array) -> Array:
        """lambda(t), decreasing in t. t: any shape."""

    @abc.abstractmethod
    def inverse(self, log_snr: Array) -> Array:
        """The time t with lambda(t) = log_snr."""

    def alpha_sigma(self, t: Array) -> tuple[Array, Array]:
        """(alpha(t), sigma(t)), each of t's shape."""
        return alpha_sigma_from_log_snr(self.log_snr(t), self.scaling)

    def alpha(self, t: Array) -> Array:
        return self.alpha_sigma(t)[0]

    def sigma(self, t: Array) -> Array:
        return self.alpha_sigma(t)[1]

    def alpha_sigma_rate(self, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(d alpha/dt, d sigma/dt), what a flow-matching velocity is made of. JAX only."""
        return jax.jvp(self.alpha_sigma, (t,), (jnp.ones_like(t),))[1]

    def log_snr_rate(self, t: jax.Array) -> jax.Array:
        """d lambda/dt (negative). JAX only."""
        return jax.jvp(self.log_snr, (t,), (jnp.ones_like(t),))[1]

    @property
    def prior_scale(self) -> float:
        """The standard deviation of x at t_max: 1 where the signal is gone, sigma(t_max) without decay."""
        return float(self.sigma(self.t_max)) if self.scaling == "ve" else 1.0


@dataclasses.dataclass(frozen=True)
class Shifted(Schedule):
    """A schedule made noisier for larger images: lambda(t) - 2 log(shift).

    Simple diffusion (Hoogeboom et al. 2023, eq. 5) with shift = image size / reference size; on a flow it is
    SD3's t' = shift t / (1 + (shift - 1) t) (Esser et al. 2024, eq. 23), since lambda is 2 log((1-t)/t).
    """

    base: Schedule
    shift: float

    @property
    def scaling(self) -> str:
        return self.base.scaling

    @property
    def t_min(self) -> float:
        return self.base.t_min

    @property
    def t_max(self) -> float:
        return self.base.t_max

    @property
    def steps(self) -> int | None:
        return self.base.steps

    def log_snr(self, t: Array) -> Array:
        return self.base.log_snr(t) - 2 * np.log(self.shift)

    def inverse(self, log_snr: Array) -> Array:
        _, l = namespace(log_snr)
        return self.base.inverse(l + 2 * np.log(self.shift))

    def alpha_sigma(self, t: Array) -> tuple[Array, Array]:
        """Both shares of the base, reweighted: exact also where lambda is infinite."""
        alpha, sigma = self.base.alpha_sigma(t)
        xp, _ = namespace(alpha)
        if self.scaling == "ve":
            return alpha, sigma * self.shift
        if self.scaling == "flow":
            total = alpha + self.shift * sigma
            return alpha / total, self.shift * sigma / total
        if self.scaling == "vp":
            total = xp.sqrt(alpha**2 + (self.shift * sigma) ** 2)
            return alpha / total, self.shift * sigma / total
        return alpha_sigma_from_log_snr(self.log_snr(t), self.scaling)
