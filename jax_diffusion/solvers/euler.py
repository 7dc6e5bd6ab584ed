"""Euler and Heun on the probability-flow ODE (Karras et al. 2022, algorithm 1).

Written in the straight frame (solvers/table.py), where dy/du = (y - D) / u on every schedule: u is EDM's sigma,
or a flow's t.
"""

import numpy as np

from jax_diffusion.solvers.table import Grid, Table, from_straight, rows


def euler(grid: Grid) -> Table:
    """y' = y + (u' - u) (y - D) / u, one evaluation a step, first order."""
    u, s = grid.straight
    r = u[1:] / u[:-1]
    table = rows(grid.t, A=r, B=1 - r, scale=grid.prior_scale, name="euler")
    return from_straight(table, s[:-1], s[1:])


def heun(grid: Grid) -> Table:
    """The trapezoid: an Euler step to u', then the mean of the slopes at both ends. Second order.

    Two evaluations a step and one for the last, which lands on u = 0 by Euler: 2N - 1 rows (algorithm 1).
    The second row needs the state before the first: the first remembers y + (u'-u)/2 (y-D)/u for it.
    """
    u, s = grid.straight
    t, P, Q, A, B, before, after = [], [], [], [], [], [], []

    def add(time, p, q, a, b, s0, s1):
        for column, value in zip((t, P, Q, A, B, before, after), (time, p, q, a, b, s0, s1), strict=True):
            column.append(value)

    for n in range(len(grid.t)):
        r = u[n + 1] / u[n]
        if u[n + 1] == 0 or n + 1 == len(grid.t):
            add(grid.t[n], 0.0, 1.0, r, (1 - r, 0.0), s[n], s[n + 1])
            continue
        # Predictor: y' = r y + (1-r) D, said through the midpoint h = (y + y') / 2.
        add(grid.t[n], (1 + r) / 2, (1 - r) / 2, -1.0, (2.0, 0.0), s[n], s[n + 1])
        # Corrector: h + (u'-u)/2 (y' - D') / u', where D' = h of this row.
        c = (1 - 1 / r) / 2
        add(grid.t[n + 1], 0.0, 1.0, c, (-c, 1.0), s[n + 1], s[n + 1])
    table = rows(t, A, B, P=P, Q=Q, scale=grid.prior_scale, name="heun")
    return from_straight(table, np.array(before), np.array(after))
