"""Singlestep DPM-Solver: Runge-Kutta-like steps of an exponential integrator (Lu et al. 2022a, algorithms 1 and 2;
Lu et al. 2022b, algorithm 1). See dpm.py and dpmpp.py.

A step of order k makes k evaluations: at its start a and at stages in between, by default at 1/2, or 1/3 and 2/3, of
the way in log(alpha / sigma). So N steps of the grid are kN evaluations, less where a step has no inside: one that
leaves a flow's alpha = 0 or lands on sigma = 0 is of first order and makes one evaluation.

With share_steps the stages are points of the grid, k of its steps being one of the solver's, and N steps of the grid
are N evaluations (the authors' "fast" solver with orders of section 3.4; diffusers' singlestep scheduler).
"""

import itertools
import math

from jax_diffusion.errors import choose
from jax_diffusion.solvers.exponential import Form, Point, first_order, integrals, points, stages
from jax_diffusion.solvers.steps import Linear, Steps
from jax_diffusion.solvers.table import Grid, Table

FRACTIONS = {1: (), 2: (1 / 2,), 3: (1 / 3, 2 / 3)}


def singlestep(grid: Grid, form: Form, order: int, solver_type: str, share_steps: bool, name: str) -> Table:
    """solver_type: midpoint as in the papers; heun: the polynomial through all of a step's predictions, exactly."""
    choose("solver_type", solver_type, ("midpoint", "heun"))
    path = points(grid)
    if share_steps:
        strides = _strides(path, order)
    else:
        insides = stages(grid, FRACTIONS[order])
        strides = [[a, *inside, b] for (a, b), inside in zip(itertools.pairwise(path), insides, strict=True)]
    steps = Steps(grid)
    x = steps.x
    for a, *inside, b in strides:
        x = _step(steps, form, x, a, inside, b, solver_type)
    return steps.table(x, name)


def _step(steps: Steps, form: Form, x: Linear, a: Point, inside: list[Point], b: Point, solver_type: str) -> Linear:
    D = steps.denoise(x, a.t)
    if not inside:
        return first_order(x, D, a, b)
    past = [(a.l, form.predicted(D, a))]
    guess = first_order(x, D, a, inside[0])
    for i, s in enumerate(inside):
        past.append((s.l, form.predicted(steps.denoise(guess, s.t), s)))
        if i + 1 < len(inside):
            # The second stage: the line through two predictions (Lu et al. 2022a, algorithm 2, line 6).
            guess = form.step(x, a, inside[1], past, integrals(form.z(a, inside[1]), 2))
    I = integrals(form.z(a, b), len(past))
    if solver_type == "heun":
        return form.step(x, a, b, past, I)
    if len(inside) == 1:
        return form.step(x, a, b, past, [I[0], I[0] / 2])
    # Algorithm 2, line 9: of the second stage's prediction alone, which at r_2 = 2/3 is enough for third order.
    return form.step(x, a, b, [past[0], past[2]], I[:2])


def _strides(path: list[Point], order: int) -> list[list[Point]]:
    """The path in strides of `order` steps; what is left over, and what is infinite, in shorter ones."""
    strides, n, last = [], 0, len(path) - 1
    ends_at_zero = path[-1].l == math.inf
    while n < last:
        k = 1 if path[n].l == -math.inf else max(1, min(order, last - n - ends_at_zero))
        strides.append(path[n : n + k + 1])
        n += k
    return strides
