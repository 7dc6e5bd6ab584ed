"""Time grids: which points a solver visits.

    leading      t = 0, T/N, 2T/N, ...  (DDIM's own; diffusers "leading")
    trailing     t = T-1, T-1-T/N, ...  (Lin et al. 2023, table 2)
    linspace     N points from T-1 to 0 (diffusers "linspace")
    linspace_open, leading_open   N+1 points of linspace or leading, less the last (diffusers' multistep schedulers)
    linspace_real  linspace without rounding (diffusers' Euler, Heun, LMS and DPM2)
    uniform      N+1 points from t_max to t_min, less the last
    quadratic    t_min + (t_max - t_min) (i/N)^2, i = N..1 (Song, Meng & Ermon 2021, app. D.2)
    beta         t_min + (t_max - t_min) F(i/N), F the Beta distribution's quantile (Lee et al. 2024)
    karras       sigma^(1/rho) uniform (Karras et al. 2022, eq. 5)
    log_snr      log SNR uniform (Lu et al. 2022a)
    exponential  log sigma uniform: the same points as log_snr, since log SNR = -2 log(sigma / alpha)
    ays_sd, ays_sdxl, ays_svd   published noise levels (Sabour et al. 2024; solvers/ays.py)

and explicit times or noise levels. On discrete schedules the first four lines give integers (rounded), the others times
between them, at which a network is evaluated as it is: the noise is then exactly what was asked for.
All end at sigma = 0 unless final="min" asks for the schedule's least noisy point (DDIM's set_alpha_to_one=False).
"""

import inspect
from collections.abc import Sequence

import numpy as np
from scipy.special import betaincinv

from jax_diffusion.errors import UserError, choose
from jax_diffusion.schedules import Schedule
from jax_diffusion.solvers import ays
from jax_diffusion.solvers.table import Grid

OF_INTEGERS = ("leading", "trailing", "linspace", "linspace_open", "leading_open", "linspace_real")
OF_TIME = ("uniform", "quadratic", "beta")
OF_NOISE = ("karras", "log_snr", "exponential")
SPACINGS = (*OF_INTEGERS, *OF_TIME, *OF_NOISE, *ays.NOISE)
UNITS = ("time", "sigma")


def times(
    schedule: Schedule,
    steps: int,
    spacing: str,
    *,
    offset: int = 0,
    rho: float = 7.0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    beta_alpha: float = 0.6,
    beta_beta: float = 0.6,
) -> np.ndarray:
    """The N = steps evaluation times, decreasing, float64 [N]. The options are those of `make`."""
    choose("grid", spacing, SPACINGS)
    if steps < 1:
        raise UserError(f"steps={steps} is too few: give at least 1")
    if spacing not in OF_NOISE and not (sigma_min is None and sigma_max is None):
        raise UserError(f"sigma_min, sigma_max: grid={spacing!r} has no use for them; {', '.join(OF_NOISE)} have")
    if spacing in OF_INTEGERS:
        return _integers(schedule, steps, spacing, offset)
    if spacing in OF_TIME:
        u = np.arange(steps, 0, -1) / steps
        if spacing == "quadratic":
            u = u**2
        if spacing == "beta":
            u = betaincinv(beta_alpha, beta_beta, u)
        return schedule.t_min + (schedule.t_max - schedule.t_min) * u
    if spacing in ays.NOISE:
        noise = ays.noise(spacing, steps)
    else:
        most, least = _noise_range(schedule, sigma_min, sigma_max)
        if spacing == "karras":
            noise = np.linspace(most ** (1 / rho), least ** (1 / rho), steps) ** rho
        else:
            noise = np.exp(np.linspace(np.log(most), np.log(least), steps))
    return _times_of_noise(schedule, noise)


def _integers(schedule: Schedule, steps: int, spacing: str, offset: int) -> np.ndarray:
    total = schedule.steps
    if total is None:
        others = ", ".join((*OF_TIME, *OF_NOISE))
        raise UserError(f"grid={spacing!r} needs a discrete schedule: choose one of {others}")
    if steps > total:
        raise UserError(f"steps={steps} is more than the schedule's {total}: give at most {total}")
    if spacing in ("leading", "leading_open"):
        skipped = int(spacing == "leading_open")
        stride = total // (steps + skipped)
        last = (steps - 1 + skipped) * stride
        if not 0 <= last + offset < total:
            raise UserError(f"offset={offset} leaves the schedule: with steps={steps} use 0 to {total - 1 - last}")
        return (np.arange(steps, dtype=np.float64)[::-1] + skipped) * stride + offset
    if spacing == "trailing":
        return np.round(np.arange(total, 0, -total / steps))[:steps] - 1.0
    if spacing == "linspace_open":
        return np.round(np.linspace(0, total - 1, steps + 1))[:0:-1].astype(np.float64)
    points = np.linspace(0, total - 1, steps)[::-1]
    return points if spacing == "linspace_real" else np.round(points)


def _noise_range(schedule: Schedule, least: float | None, most: float | None) -> tuple[float, float]:
    """(most, least) sigma / alpha of the grid: the schedule's where not given."""
    for name, value in (("sigma_min", least), ("sigma_max", most)):
        if not (value is None or isinstance(value, int | float)):
            raise UserError(f"{name}={value!r} of the grid should be a number")
    given = least, most
    lo, hi = schedule.log_snr(np.float64(schedule.t_min)), schedule.log_snr(np.float64(schedule.t_max))
    # Flows have no noise at 0 and nothing else at 1.
    least = np.exp(-min(lo, 20.0) / 2) if least is None else least
    most = np.exp(-max(hi, -20.0) / 2) if most is None else most
    if not 0 < least < most:
        raise UserError(f"sigma_min, sigma_max: {given} leave nothing between {least:.4g} and {most:.4g}")
    return float(most), float(least)


def _times_of_noise(schedule: Schedule, noise: np.ndarray) -> np.ndarray:
    """The times with sigma / alpha = noise. Levels that the schedule lacks by the rounding of published lists (three
    decimals) are its ends; variance-exploding schedules go on past theirs."""
    l = -2 * np.log(noise)
    if schedule.scaling != "ve":
        hi, lo = schedule.log_snr(np.array([schedule.t_min, schedule.t_max], np.float64))
        out = (l > hi + 2e-3) | (l < lo - 2e-3)
        if np.any(out):
            ends = f"{np.exp(-hi / 2):.4g} to {np.exp(-lo / 2):.4g}"
            raise UserError(f"grid: noise {noise[out][0]:.4g} (sigma / alpha) is outside the schedule's {ends}")
        l = np.clip(l, lo, hi)
    return np.asarray(schedule.inverse(l), np.float64)


def parse(text: str) -> list[float] | str:
    """What a command line says: "999,850,736" is a list of numbers, anything else a spacing."""
    if not text[:1].isdigit():
        return text
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"grid={text!r}: write numbers with commas between, or one of {', '.join(SPACINGS)}") from None


def _explicit(schedule: Schedule, points: Sequence[float], unit: str) -> np.ndarray:
    """The times of a list that the user gives, of times or of sigma / alpha; a last sigma of 0 is the landing."""
    choose("grid_unit", unit, UNITS)
    given = np.asarray(points, np.float64)
    if unit == "time":
        return given
    if given.ndim == 1 and len(given) > 1 and given[-1] == 0:
        given = given[:-1]
    if np.any(given <= 0):
        raise UserError("grid: noise levels must be positive; only the last may be 0, where the solver lands")
    return _times_of_noise(schedule, given)


def from_times(schedule: Schedule, t: np.ndarray, final: str = "zero") -> Grid:
    """The grid through explicit times t [N], decreasing; final: "zero" lands on sigma = 0, "min" on t_min."""
    choose("final", final, ("zero", "min"))
    t = np.asarray(t, np.float64)
    if t.ndim != 1 or len(t) < 1 or np.any(np.diff(t) >= 0):
        raise UserError("grid: the times must be a decreasing list of at least one")
    # A variance-exploding network is conditioned on the noise itself, which has no last level.
    if schedule.scaling != "ve" and not (schedule.t_min <= t[-1] and t[0] <= schedule.t_max):
        ends = f"{schedule.t_max:g} to {schedule.t_min:g}"
        raise UserError(f"grid: times {t[0]:g} to {t[-1]:g} leave the schedule's {ends}")
    alpha, sigma = schedule.alpha_sigma(t)
    if not sigma[-1] > 0:
        raise UserError(f"grid: at its last time, {t[-1]:g}, there is no noise to remove; end the list above it")
    end = (1.0, 0.0) if final == "zero" else schedule.alpha_sigma(np.float64(schedule.t_min))
    return Grid(
        t=t,
        alpha=np.append(alpha, end[0]),
        sigma=np.append(sigma, end[1]),
        schedule=schedule,
        # Where alpha^2 + sigma^2 = 1 or alpha + sigma = 1 the schedule's prior, also for a grid that begins below
        # t_max ("leading" does); without decay of the signal the noise of the first point, wherever it is.
        prior_scale=float(sigma[0]) if schedule.scaling == "ve" else schedule.prior_scale,
    )


def make(
    schedule: Schedule,
    steps: int | None = None,
    spacing: str | Sequence[float] | None = None,
    *,
    final: str = "zero",
    grid_unit: str = "time",
    offset: int = 0,
    rho: float = 7.0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    beta_alpha: float = 0.6,
    beta_beta: float = 0.6,
) -> Grid:
    """A grid of `steps` evaluations. The default spacing is the schedule's: trailing on discrete ones, karras
    on variance-exploding ones, uniform elsewhere.

    spacing:    one by name, or the points themselves, decreasing: [999, 850, 736]; `steps` is then their number.
    final:      "zero" lands on sigma = 0, "min" on the schedule's least noisy point.
    grid_unit:  what an explicit list is of: "time", or "sigma" (sigma / alpha, EDM's and diffusers' sigma).
    offset:     added to the times of "leading" (diffusers' steps_offset).
    rho:        of karras.
    sigma_min, sigma_max: the ends of karras, log_snr and exponential; by default the schedule's own. diffusers takes
        them from the times of its timestep_spacing, which for "linspace" is the same.
    beta_alpha, beta_beta: the Beta distribution's; 0.6 and 0.6 in the paper.
    """
    if spacing is None:
        spacing = "trailing" if schedule.steps else "karras" if schedule.scaling == "ve" else "uniform"
    if isinstance(spacing, str):
        spacing = parse(spacing)
    if isinstance(spacing, str):
        if steps is None:
            raise UserError(f"steps: how many? grid={spacing!r} needs to know")
        t = times(
            schedule,
            steps,
            spacing,
            offset=offset,
            rho=rho,
            sigma_min=sigma_min,
            sigma_max=sigma_max,
            beta_alpha=beta_alpha,
            beta_beta=beta_beta,
        )
        return from_times(schedule, t, final)
    t = _explicit(schedule, spacing, grid_unit)
    if steps is not None and t.shape != (steps,):
        raise UserError(f"steps={steps}, but the grid lists {t.size} points: give steps={t.size}, or leave it out")
    return from_times(schedule, t, final)


OPTIONS = tuple(inspect.signature(make).parameters)[3:]
