"""Continuous time: VP, sub-VP and VE SDEs, EDM, rectified flow, cosine, linear in log-SNR."""

import dataclasses

import numpy as np

from jax_diffusion.schedules.base import (
    Array,
    Schedule,
    alpha_sigma_from_log_snr,
    log_sigmoid,
    namespace,
    sigmoid,
)


@dataclasses.dataclass(frozen=True)
class VPLinear(Schedule):
    """The VP-SDE: alpha_bar(t) = exp(-B(t)), B = beta_min t + (beta_max - beta_min) t^2 / 2.

    Song et al. 2021, eq. 32-33; with scaling="subvp" the sub-VP-SDE (eq. 29), same mean, sigma = 1-alpha^2.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-5
    t_max: float = 1.0
    scaling: str = "vp"

    def log_snr(self, t: Array) -> Array:
        xp, t = namespace(t)
        b = self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t * t
        # vp: log(e^-B / (1 - e^-B)); subvp has sigma = 1 - e^-B, so the noise counts twice.
        noise = xp.log(-xp.expm1(-b))
        return -b - (noise if self.scaling == "vp" else 2 * noise)

    def inverse(self, log_snr: Array) -> Array:
        xp, l = namespace(log_snr)
        # B = -2 log alpha; where alpha is nearly 1, sub-VP's is taken from sigma = 1 - alpha^2.
        if self.scaling == "vp":
            b = -log_sigmoid(l)
        else:
            alpha, sigma = alpha_sigma_from_log_snr(l, "subvp")
            b = xp.where(l > 0, -xp.log1p(-xp.minimum(sigma, 0.9)), -2 * xp.log(alpha))
        slope = self.beta_max - self.beta_min
        return 2 * b / (xp.sqrt(self.beta_min**2 + 2 * slope * b) + self.beta_min)


@dataclasses.dataclass(frozen=True)
class VE(Schedule):
    """The VE-SDE: sigma(t) = sigma_min (sigma_max / sigma_min)^t (Song et al. 2021, eq. 31)."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    t_min: float = 0.0
    t_max: float = 1.0
    scaling = "ve"

    def log_snr(self, t: Array) -> Array:
        _, t = namespace(t)
        return -2 * (np.log(self.sigma_min) + t * np.log(self.sigma_max / self.sigma_min))

    def inverse(self, log_snr: Array) -> Array:
        _, l = namespace(log_snr)
        return (-l / 2 - np.log(self.sigma_min)) / np.log(self.sigma_max / self.sigma_min)


@dataclasses.dataclass(frozen=True)
class EDM(Schedule):
    """alpha = 1 and sigma = t: time is the noise level itself (Karras et al. 2022, table 1)."""

    t_min: float = 0.002
    t_max: float = 80.0
    scaling = "ve"

    def log_snr(self, t: Array) -> Array:
        xp, t = namespace(t)
        return -2 * xp.log(t)

    def inverse(self, log_snr: Array) -> Array:
        xp, l = namespace(log_snr)
        return xp.exp(-l / 2)

    def alpha_sigma(self, t: Array) -> tuple[Array, Array]:
        xp, t = namespace(t)
        return xp.ones_like(t), t


@dataclasses.dataclass(frozen=True)
class Flow(Schedule):
    """Rectified flow: x_t = (1 - t) x_0 + t eps (Liu et al. 2022; Lipman et al. 2022, optimal transport)."""

    t_min: float = 0.0
    t_max: float = 1.0
    scaling = "flow"

    def log_snr(self, t: Array) -> Array:
        xp, t = namespace(t)
        with np.errstate(divide="ignore"):  # infinite at both ends, and meant
            return 2 * (xp.log1p(-t) - xp.log(t))

    def inverse(self, log_snr: Array) -> Array:
        _, l = namespace(log_snr)
        return sigmoid(-l / 2)

    def alpha_sigma(self, t: Array) -> tuple[Array, Array]:
        # Said directly: through lambda the ends would be infinite, and so their derivatives.
        _, t = namespace(t)
        return 1 - t, t


@dataclasses.dataclass(frozen=True)
class Cosine(Schedule):
    """Continuous cosine, lambda(t) = -2 log tan(pi t / 2), cut to [lambda_min, lambda_max].

    Hoogeboom et al. 2023 (simple diffusion), section 2 and its appendix: t is rescaled so that the ends of
    [0, 1] are the ends of the cut, and nothing is infinite.
    """

    log_snr_min: float = -15.0
    log_snr_max: float = 15.0
    t_min: float = 0.0
    t_max: float = 1.0
    scaling = "vp"

    def _ends(self):
        return np.arctan(np.exp(-0.5 * self.log_snr_max)), np.arctan(np.exp(-0.5 * self.log_snr_min))

    def log_snr(self, t: Array) -> Array:
        xp, t = namespace(t)
        lo, hi = self._ends()
        return -2 * xp.log(xp.tan(lo + t * (hi - lo)))

    def inverse(self, log_snr: Array) -> Array:
        xp, l = namespace(log_snr)
        lo, hi = self._ends()
        return (xp.arctan(xp.exp(-l / 2)) - lo) / (hi - lo)


@dataclasses.dataclass(frozen=True)
class LinearLogSNR(Schedule):
    """lambda(t) linear in t between its ends: VDM's schedule at initialisation, and its fixed baseline."""

    log_snr_min: float = -10.0
    log_snr_max: float = 13.3
    t_min: float = 0.0
    t_max: float = 1.0
    scaling: str = "vp"

    def log_snr(self, t: Array) -> Array:
        _, t = namespace(t)
        return self.log_snr_max + t * (self.log_snr_min - self.log_snr_max)

    def inverse(self, log_snr: Array) -> Array:
        _, l = namespace(log_snr)
        return (l - self.log_snr_max) / (self.log_snr_min - self.log_snr_max)
