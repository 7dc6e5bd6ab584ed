"""Time grids: which points a solver visits.

    leading     t = 0, T/N, 2T/N, ...  (DDIM's own; diffusers "leading")
    trailing    t = T-1, T-1-T/N, ...  (Lin et al. 2023, table 2)
    linspace    N points from T-1 to 0 (diffusers "linspace")
    uniform     N+1 points from t_max to t_min in continuous time
    karras      sigma^(1/rho) uniform (Karras et al. 2022, eq. 5)
    log_snr     uniform in log SNR (Lu et al. 2022)

On discrete schedules the first three give integers. All of them end at sigma = 0 unless final="min" asks for
the schedule's least noisy point (DDIM's set_alpha_to_one=False).
"""

import numpy as np

from jax_diffusion.errors import UserError, choose
from jax_diffusion.schedules import Schedule
from jax_diffusion.solvers.table import Grid

SPACINGS = ("leading", "trailing", "linspace", "uniform", "karras", "log_snr")


def times(schedule: Schedule, steps: int, spacing: str, *, offset: int = 0, rho: float = 7.0) -> np.ndarray:
    """The N = steps evaluation times, decreasing, float64 [N]."""
    choose("grid", spacing, SPACINGS)
    total = schedule.steps
    if steps < 1:
        raise UserError(f"steps={steps} is too few: give at least 1")
    if spacing in ("leading", "trailing", "linspace"):
        if total is None:
            raise UserError(f"grid={spacing!r} needs a discrete schedule: choose one of uniform, karras, log_snr")
        if steps > total:
            raise UserError(f"steps={steps} is more than the schedule's {total}: give at most {total}")
        if spacing == "leading":
            last = (steps - 1) * (total // steps)
            if not 0 <= last + offset < total:
                raise UserError(f"offset={offset} leaves the schedule: with steps={steps} use 0 to {total - 1 - last}")
            return np.arange(steps, dtype=np.float64)[::-1] * (total // steps) + offset
        if spacing == "trailing":
            return np.round(np.arange(total, 0, -total / steps))[:steps] - 1.0
        return np.round(np.linspace(0, total - 1, steps))[::-1].astype(np.float64)
    if spacing == "uniform":
        return np.linspace(schedule.t_max, schedule.t_min, steps + 1)[:-1]
    lo, hi = schedule.log_snr(np.float64(schedule.t_min)), schedule.log_snr(np.float64(schedule.t_max))
    lo, hi = min(lo, 20.0), max(hi, -20.0)  # flows have no noise at 0 and nothing else at 1
    if spacing == "log_snr":
        l = np.linspace(hi, lo, steps)
    else:
        s_max, s_min = np.exp(-hi / 2 / rho), np.exp(-lo / 2 / rho)
        l = -2 * rho * np.log(np.linspace(s_max, s_min, steps))
    return np.asarray(schedule.inverse(l), np.float64)


def from_times(schedule: Schedule, t: np.ndarray, final: str = "zero") -> Grid:
    """The grid through explicit times t [N], decreasing; final: "zero" lands on sigma = 0, "min" on t_min."""
    choose("final", final, ("zero", "min"))
    t = np.asarray(t, np.float64)
    if t.ndim != 1 or len(t) < 1 or np.any(np.diff(t) >= 0):
        raise UserError("grid: the times must be a decreasing list of at least one")
    alpha, sigma = schedule.alpha_sigma(t)
    end = (1.0, 0.0) if final == "zero" else schedule.alpha_sigma(np.float64(schedule.t_min))
    return Grid(
        t=t,
        alpha=np.append(alpha, end[0]),
        sigma=np.append(sigma, end[1]),
        scaling=schedule.scaling,
        prior_scale=schedule.prior_scale if t[0] >= schedule.t_max else _scale_at(schedule, t[0]),
    )


def _scale_at(schedule: Schedule, t: float) -> float:
    """The noise to start from when the grid begins below t_max ("leading" does): the schedule's own prior
    where alpha^2 + sigma^2 = 1 or alpha + sigma = 1, else sigma(t)."""
    return float(schedule.sigma(np.float64(t))) if schedule.scaling == "ve" else schedule.prior_scale


def make(
    schedule: Schedule,
    steps: int,
    spacing: str | None = None,
    *,
    final: str = "zero",
    offset: int = 0,
    rho: float = 7.0,
) -> Grid:
    """A grid of `steps` evaluations. The default spacing is the schedule's: trailing on discrete ones, karras
    on variance-exploding ones, uniform elsewhere."""
    if spacing is None:
        spacing = "trailing" if schedule.steps else "karras" if schedule.scaling == "ve" else "uniform"
    return from_times(schedule, times(schedule, steps, spacing, offset=offset, rho=rho), final)
