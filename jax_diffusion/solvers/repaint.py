"""RePaint's resampling (Lugmayr et al. 2022, algorithm 1): a solver that goes back and forth.

Replacing the known pixels (editing.replace_known) tells the others about them only through the next evaluation,
too late to be heard at low noise. RePaint therefore returns to a noisier level after `jump_length` steps,

    x_{t+j} = sqrt(alpha_bar_{t+j} / alpha_bar_t) x_t + noise,

and denoises again, `resamples` times in all. Going back is linear in the state, so it is part of a table's row: one
row is still one network evaluation.
"""

import itertools

import numpy as np

from jax_diffusion.errors import UserError
from jax_diffusion.posterior import coefficients
from jax_diffusion.solvers.table import Grid, Table, rows


def levels(n: int, jump_length: int, resamples: int) -> list[int]:
    """The levels of noise visited, from n - 1 (all noise) to -1 (clean): the paper's appendix, `get_schedule_jump`.

    A level i is the grid's point n - 1 - i. Each multiple of jump_length below n - jump_length is left upwards
    resamples - 1 times before the way down goes on.
    """
    left = dict.fromkeys(range(0, n - jump_length, jump_length), resamples - 1)
    visited = [n - 1]
    while visited[-1] >= 0:
        level = visited[-1]
        if left.get(level, 0) > 0:
            left[level] -= 1
            visited += range(level + 1, level + jump_length + 1)
            level = visited[-1]
        visited.append(level - 1)
    return visited


def repaint(grid: Grid, jump_length: int = 10, resamples: int = 10, eta: float = 1.0) -> Table:
    """DDIM steps with `eta` (1: DDPM's ancestral ones, as in the paper) along `levels`.

    jump_length: j, how many steps back and forth.  resamples: r, how often each stretch is denoised; 1 is none.
    The cost is about `resamples` times the evaluations of the plain solver.
    """
    for name, value in (("jump_length", jump_length), ("resamples", resamples)):
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{name}={value} of solver 'repaint' must be a whole number of at least 1")
    alpha, sigma, l = grid.alpha, grid.sigma, grid.log_snr
    n = len(grid.t)
    t, A, B, C = [], [], [], []
    visited = [n - 1 - level for level in levels(n, jump_length, resamples)]  # as points of the grid
    for a, b in itertools.pairwise(visited):
        if b > a:
            variance = coefficients(l[a], l[b], alpha[a], alpha[b], sigma[a], sigma[b], xp=np)[2]
            c = eta * np.sqrt(variance)
            direction = np.sqrt(max(sigma[b] ** 2 - c**2, 0.0)) / sigma[a]
            t.append(grid.t[a])
            A.append(direction)
            B.append(alpha[b] - direction * alpha[a])
            C.append(c)
        else:
            # Back to more noise from where the last row ends.
            ratio = alpha[b] / alpha[a]
            A[-1] *= ratio
            B[-1] *= ratio
            C[-1] = np.sqrt((ratio * C[-1]) ** 2 + sigma[b] ** 2 - (ratio * sigma[a]) ** 2)
    name = f"repaint(jump_length={jump_length}, resamples={resamples})"
    return rows(t, A, B, C, scale=grid.prior_scale, name=name)
