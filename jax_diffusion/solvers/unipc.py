"""UniPC (Zhao et al. 2023): a predictor and a corrector at one evaluation a step."""

import itertools
import math

from jax_diffusion.errors import choose
from jax_diffusion.solvers import exponential
from jax_diffusion.solvers.exponential import DATA, NOISE, check_order, first_order, integrals, multistep_order
from jax_diffusion.solvers.steps import Linear, Steps
from jax_diffusion.solvers.table import Grid, Table


def unipc(
    grid: Grid,
    order: int = 3,
    solver_type: str = "bh2",
    predict_x0: bool = True,
    corrector: bool = True,
    lower_order_final: bool = True,
) -> Table:
    """UniPC-p, algorithms 1 and 2 and their versions for data prediction. Order p + 1 with the corrector, p without.

    UniP-p goes to the next point with the polynomial through the last p predictions; the network is evaluated there;
    UniC-p goes the same step again with the new prediction as one more node. The prediction is not made again at the
    corrected state, so the last step is not corrected.

    solver_type: bh1 or bh2, the paper's B(h) = h or e^h - 1. It matters only where a single difference is weighted
        without solving for its weight, I_1 = B / 2: in UniP-2 and UniC-1. (Elsewhere B cancels.)
    predict_x0: data prediction, or noise prediction.
    lower_order_final: the last step is of first order, the one before of second, ... as in diffusers. A step that
        lands on sigma = 0 is of first order in any case.
    """
    check_order("unipc", order, 3)
    choose("solver_type", solver_type, ("bh1", "bh2"))
    form = DATA if predict_x0 else NOISE

    def moments(z: float, count: int) -> list[float]:
        I = integrals(z, count)
        return [I[0], (z if solver_type == "bh1" else I[0]) / 2] if count == 2 else I

    path, steps = exponential.points(grid), Steps(grid)
    x, before, k = steps.x, steps.x, 0  # before: the state that the last step began with
    past: list[tuple[float, Linear]] = []
    for n, (a, b) in enumerate(itertools.pairwise(path)):
        D = steps.denoise(x, a.t)
        new = (a.l, form.predicted(D, a))
        if corrector and n > 0 and math.isfinite(path[n - 1].l):
            x = form.step(before, path[n - 1], a, [*past[:k], new], moments(form.z(path[n - 1], a), k + 1))
        past = [new, *past][:order]
        k = multistep_order(n, path, order)
        if lower_order_final:
            k = min(k, len(grid.t) - n)
        before = x
        if math.isfinite(a.l) and math.isfinite(b.l):
            x = form.step(x, a, b, past[:k], moments(form.z(a, b), k))
        else:
            x = first_order(x, D, a, b)
    return steps.table(x, f"unipc(order={order}, {solver_type})")
