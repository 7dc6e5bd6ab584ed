"""DDPM: a table of T betas."""

import dataclasses

import numpy as np
from scipy.special import expit

from jax_diffusion.errors import UserError, choose
from jax_diffusion.schedules.base import Array, Schedule, alpha_sigma_from_log_snr, namespace


def betas(name: str = "linear", steps: int = 1000, start: float = 1e-4, end: float = 0.02) -> np.ndarray:
    """The beta_t of a discrete model, float64 [steps].

    linear         Ho et al. 2020, section 4 (start and end are for 1,000 steps, as in the paper).
    scaled_linear  linear in sqrt(beta): latent diffusion (start=0.00085, end=0.012).
    cosine         Nichol & Dhariwal 2021, eq. 17, betas capped at 0.999. Ignores start and end.
    sigmoid        Xu et al. 2022 (GeoDiff): start + (end - start) sigmoid(u), u in [-6, 6].
    geometric      log-spaced between start and end.
    """
    choose("schedule.betas", name, BETAS)
    return BETAS[name](steps, start, end)


def rescale_to_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Betas with nothing left of the signal at T-1 (Lin et al. 2023, algorithm 1), float64 [T]; the last is 1.

    sqrt(alpha_bar) is shifted so that its last value is 0 and scaled so that its first stays as it was.
    """
    root = np.sqrt(np.cumprod(1 - betas))
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    # 1 - alpha_bar_t / alpha_bar_{t-1} as a product, which keeps the digits of small betas.
    before = np.append(1.0, root[:-1])
    return (before - root) * (before + root) / before**2


def _cosine_betas(steps: int, start: float, end: float) -> np.ndarray:
    u = np.arange(steps + 1) / steps
    alpha_bar = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


def sigmoid_alpha_bar(steps: int = 1000, start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> np.ndarray:
    """Betas, capped at 0.999, of an alpha_bar that falls from 1 to 0 as a sigmoid of [start, end] / tau
    (Jabri et al. 2022, "Scalable adaptive computation for iterative generation", figure 8), float64 [steps]."""
    alpha_bar = expit(-np.linspace(start, end, steps + 1) / tau) - expit(-end / tau)
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


BETAS = {
    "linear": lambda n, a, b: np.linspace(a, b, n, dtype=np.float64),
    "scaled_linear": lambda n, a, b: np.linspace(a**0.5, b**0.5, n, dtype=np.float64) ** 2,
    "cosine": _cosine_betas,
    "sigmoid": lambda n, a, b: a + (b - a) * expit(np.linspace(-6, 6, n, dtype=np.float64)),
    "geometric": lambda n, a, b: np.geomspace(a, b, n, dtype=np.float64),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Discrete(Schedule):
    """T steps given by betas: alpha_bar_t = prod_{s<=t} (1 - beta_s), alpha = sqrt(alpha_bar) (DDPM, eq. 4).

    The table holds lambda in float64. Between the integers lambda is interpolated linearly, so that every
    continuous solver runs on a discrete model; the derivative is that of the segment. If the last beta is 1
    (rescale_to_zero_terminal_snr), lambda ends at -infinity, and on the last segment it is alpha that is linear.
    """

    betas: np.ndarray  # float64 [T]
    scaling = "vp"
    t_min = 0.0

    def __post_init__(self):
        b = np.asarray(self.betas, np.float64)
        if b.ndim != 1 or len(b) < 2 or not (np.all((b > 0) & (b <= 1)) and np.all(b[:-1] < 1)):
            raise UserError(
                "schedule.betas: at least two values, each strictly between 0 and 1, are needed; only the last may be 1"
            )
        object.__setattr__(self, "betas", b)

    @property
    def steps(self) -> int:
        return len(self.betas)

    @property
    def t_max(self) -> float:
        return float(self.steps - 1)

    @property
    def alpha_bar(self) -> np.ndarray:
        """prod (1 - beta), float64 [T]."""
        return np.cumprod(1 - self.betas)

    @property
    def log_snr_table(self) -> np.ndarray:
        """lambda at the integers, float64 [T]; from log1p, so that 1 - alpha_bar loses no digits."""
        with np.errstate(divide="ignore"):  # -infinity where no signal is left
            log_alpha_bar = np.cumsum(np.log1p(-self.betas))
        return log_alpha_bar - np.log(-np.expm1(log_alpha_bar))

    @property
    def ends_in_pure_noise(self) -> bool:
        """Whether alpha is exactly 0 at T-1."""
        return bool(self.betas[-1] == 1)

    @property
    def _alpha_before(self) -> float:
        """alpha at T-2."""
        return float(np.sqrt(np.prod(1 - self.betas[:-1])))

    def _last_segment(self, t: Array) -> tuple[Array, Array]:
        """(whether t is in the last segment, alpha there if the schedule ends in pure noise)."""
        xp, t = namespace(t)
        last = t >= self.steps - 2
        return last, self._alpha_before * xp.where(last, self.steps - 1 - t, 1.0)

    def log_snr(self, t: Array) -> Array:
        xp, t = namespace(t)
        if not self.ends_in_pure_noise:
            return xp.interp(t, np.arange(self.steps), self.log_snr_table)
        last, alpha = self._last_segment(t)
        with np.errstate(divide="ignore"):
            l = 2 * xp.log(alpha) - xp.log1p(-alpha * alpha)
        return xp.where(last, l, xp.interp(t, np.arange(self.steps - 1), self.log_snr_table[:-1]))

    def inverse(self, log_snr: Array) -> Array:
        xp, l = namespace(log_snr)
        table, t = self.log_snr_table, np.arange(self.steps, dtype=np.float64)
        if not self.ends_in_pure_noise:
            return xp.interp(-l, -table, t)
        alpha, _ = alpha_sigma_from_log_snr(l, self.scaling)
        last = self.steps - 1 - alpha / self._alpha_before
        return xp.where(l < table[-2], last, xp.interp(-l, -table[:-1], t[:-1]))

    def alpha_sigma(self, t: Array) -> tuple[Array, Array]:
        if not self.ends_in_pure_noise:
            return super().alpha_sigma(t)
        # Said directly: through lambda = -infinity the derivatives would be lost.
        xp, t = namespace(t)
        last, alpha = self._last_segment(t)
        l = xp.interp(t, np.arange(self.steps - 1), self.log_snr_table[:-1])
        rest = alpha_sigma_from_log_snr(l, self.scaling)
        return xp.where(last, alpha, rest[0]), xp.where(last, xp.sqrt(1 - alpha * alpha), rest[1])
