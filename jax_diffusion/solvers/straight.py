"""Points in the straight frame, and noise put back into a state.

In the frame y = x / s a sample with fixed x_0 and eps moves on a straight line in u (Grid.frame), and the
probability-flow ODE is dy/du = (y - D) / u: what Runge-Kutta methods are written in. Noise is measured by
sigma / alpha, which is EDM's sigma on every schedule: raising it from a to b adds sqrt(b^2 - a^2) to x / alpha.
"""

from typing import NamedTuple

import numpy as np

from jax_diffusion.errors import UserError
from jax_diffusion.solvers.steps import Linear, Steps
from jax_diffusion.solvers.table import Grid


class Point(NamedTuple):
    """A time and what it means there."""

    t: float
    alpha: float
    sigma: float
    u: float
    s: float

    @property
    def noise(self) -> float:
        """sigma / alpha, EDM's sigma; infinite where there is no signal."""
        return self.sigma / self.alpha if self.alpha else np.inf


def points(grid: Grid) -> list[Point]:
    """The grid's N+1 points. The last one's time is the schedule's for its noise: no network sees sigma = 0."""
    u, s = grid.straight
    t = [*grid.t, grid.between(grid.half_log_snr[-1])[0] if grid.sigma[-1] else grid.schedule.t_min]
    return [Point(*map(float, p)) for p in zip(t, grid.alpha, grid.sigma, u, s, strict=True)]


def at_noise(grid: Grid, noise: float) -> Point:
    """The point with sigma / alpha = noise, or the schedule's end beyond it; only VE and EDM go on past their ends."""
    t, alpha, sigma = grid.between(-np.log(noise))
    if grid.schedule.scaling != "ve":
        t = min(max(t, grid.schedule.t_min), grid.schedule.t_max)
        alpha, sigma = grid.schedule.alpha_sigma(np.float64(t))
    u, s = grid.frame(alpha, sigma)
    return Point(*map(float, (t, alpha, sigma, u, s)))


def at_u(grid: Grid, u: float) -> Point:
    """The point at u; beyond the schedule's ends the network is shown the end, and u stays as asked."""
    return at_noise(grid, u / (1 - u) if grid.has_pure_noise else u)._replace(u=u)


def raise_noise(steps: Steps, x: Linear, here: Point, there: Point, S_noise: float = 1.0) -> Linear:
    """The state x at `here` with the noise that `there` has more, S_noise times its standard deviation."""
    more = np.sqrt(max(there.noise**2 - here.noise**2, 0.0))
    return there.alpha * (x / here.alpha + S_noise * more * steps.noise())


def churn(
    steps: Steps, x: Linear, here: Point, S_churn: float, S_tmin: float, S_tmax: float, S_noise: float
) -> tuple[Linear, Point]:
    """Temporarily raises the noise by gamma before a step (Karras et al. 2022, algorithm 2, lines 4-6).

    S_churn: noise to add in all; each of the N steps raises sigma / alpha by gamma = min(S_churn / N, sqrt(2) - 1).
    S_tmin, S_tmax: the range of sigma / alpha in which it is raised; EDM's sigma on variance-exploding schedules.
    S_noise: factor of the added noise's standard deviation; slightly above 1 makes up for detail lost.

    The raised level stops at t_max, beyond which no network was trained; only VE and EDM go on, as in the paper's
    code. Pure noise (alpha = 0) cannot be raised. The first point is raised on VE and EDM alone: elsewhere the state
    handed in would have to be shrunk, and it holds the prior's noise or noise just added, all of it fresh.
    """
    if S_churn < 0:
        raise UserError(f"S_churn={S_churn:g} must be at least 0, which is the deterministic solver")
    gamma = min(S_churn / len(steps.grid.t), np.sqrt(2) - 1) if S_tmin <= here.noise <= S_tmax else 0.0
    first = here.t == steps.grid.t[0] and steps.grid.schedule.scaling != "ve"
    if gamma == 0 or here.alpha == 0 or first:
        return x, here
    raised = at_noise(steps.grid, here.noise * (1 + gamma))
    return raise_noise(steps, x, here, raised, S_noise), raised
