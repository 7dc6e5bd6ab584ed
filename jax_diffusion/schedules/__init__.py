"""Noise schedules: pure functions of time.

A schedule says how much signal and noise a sample holds at time t,

    x_t = alpha(t) x_0 + sigma(t) eps,        eps ~ N(0, I),                              (1)

and everything else follows from the log signal-to-noise ratio

    lambda(t) = log(alpha(t)^2 / sigma(t)^2)                                              (2)

(Kingma et al. 2021, "Variational Diffusion Models", section 3). A schedule is therefore lambda(t) plus one
of four *scalings*, which fix the pair (alpha, sigma) that has that ratio:

    vp     alpha^2 + sigma^2 = 1        DDPM, VP-SDE, VDM
    subvp  alpha^2 + sigma   = 1        sub-VP-SDE (Song et al. 2021)
    ve     alpha             = 1        SMLD, VE-SDE, EDM
    flow   alpha   + sigma   = 1        rectified flow, Stable Diffusion 3

NumPy in, float64 NumPy out (solver tables); JAX in, float32 JAX out (training). Times are what the network
is conditioned on: integers 0..T-1 for discrete models, [0, 1] for continuous ones, sigma itself for EDM.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from jax_diffusion.errors import UserError, check_options, choose
from jax_diffusion.schedules.base import Schedule, Shifted, alpha_sigma_from_log_snr
from jax_diffusion.schedules.continuous import EDM, VE, Cosine, Flow, LinearLogSNR, VPLinear
from jax_diffusion.schedules.discrete import (
    BETAS,
    Discrete,
    betas,
    rescale_to_zero_terminal_snr,
    sigmoid_alpha_bar,
)
from jax_diffusion.schedules.learned import Learned

__all__ = [
    "BETAS",
    "EDM",
    "SCHEDULES",
    "VE",
    "Cosine",
    "Discrete",
    "Flow",
    "Learned",
    "LinearLogSNR",
    "Schedule",
    "Shifted",
    "VPLinear",
    "alpha_sigma_from_log_snr",
    "betas",
    "make",
]


def _discrete(name: str):
    def build(steps: int = 1000, start: float = 1e-4, end: float = 0.02, zero_terminal_snr: bool = False) -> Discrete:
        b = betas(name, int(steps), start, end)
        return Discrete(rescale_to_zero_terminal_snr(b) if zero_terminal_snr else b)

    return build


def _sigmoid_alpha_bar(steps: int = 1000, start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> Discrete:
    return Discrete(sigmoid_alpha_bar(int(steps), start, end, tau))


def _explicit(values: Sequence[float] = ()) -> Discrete:
    """A table of betas, one a step: trained_betas of diffusers, the buffers of a checkpoint."""
    try:
        return Discrete(np.asarray(values, np.float64))
    except (TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError("schedule.values should be a list of numbers, the beta of each step") from None


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    **{name: _discrete(name) for name in BETAS},
    "sigmoid_alpha_bar": _sigmoid_alpha_bar,
    "betas": _explicit,
    "vp": VPLinear,
    "subvp": lambda **kw: VPLinear(scaling="subvp", **kw),
    "ve": VE,
    "edm": EDM,
    "flow": Flow,
    "cosine_continuous": Cosine,
    "linear_log_snr": LinearLogSNR,
    "learned": lambda seed=0, **kw: Learned.init(jax.random.key(seed), **kw),
}


def make(name: str, *, shift: float = 1.0, **options) -> Schedule:
    """The schedule called `name` in SCHEDULES. `shift` != 1 adapts it to a resolution (see Shifted).

    >>> make("linear").alpha_bar[-1]        # 4.036e-05: what DDPM leaves of the signal
    """
    choose("schedule", name, SCHEDULES)
    check_options(f"schedule {name!r}", SCHEDULES[name], options, also="shift")
    schedule = SCHEDULES[name](**options)
    return schedule if shift == 1.0 else Shifted(schedule, float(shift))
