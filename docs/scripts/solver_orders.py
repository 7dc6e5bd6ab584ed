"""The order of every solver, measured: docs/solver_orders.png and a Markdown table.

    python docs/scripts/solver_orders.py --out=docs/solver_orders.png --page=docs/solvers.md

A mixture of two Gaussians has a denoiser in closed form, and its probability-flow ODE in one dimension an exact
solution: it carries quantiles, F_s(x_s) = F_t(x_t). Every solver goes from lambda = -4 to 4 of the VP-SDE on N steps
uniform in lambda, in float64 (NumPy: the recurrence of solvers/table.py said once more); the error is the largest over
starting points. The order is the slope of log error against log N, from the finest steps above rounding.

A multistep method of order 3 starts with a step of order 1, whose error of h^2 stays: so measured, it is of second
order like every code's. Its own order shows where the start is refined, by RAMP steps that double in length up to h.

Stochastic solvers are measured by their law: from one point that is a Gaussian's, mean and variance go through the
rows exactly (both are linear), and the error is that of the variance.
"""

import argparse

import numpy as np
import page
from scipy.optimize import brentq
from scipy.stats import norm

import jax_diffusion as jd
from jax_diffusion.solvers import grids

SCHEDULE = jd.schedules.make("vp")
MU, S2 = 0.5, 0.15  # x_0 ~ N(+-MU, S2)
X = np.array([-1.7, -0.8, -0.3, 0.2, 0.9, 1.6])
RAMP = 14
STEPS = (4, 8, 16, 32, 64, 128, 256, 512)
# (solver, options): (label, order the papers give)
DETERMINISTIC = [
    ("ddim", {}, 1), ("euler", {}, 1), ("heun", {}, 2), ("dpm2", {}, 2),
    ("plms", {}, 2), ("pndm", {}, 2), ("lms", {"order": 2}, 2), ("lms", {"order": 3}, 3), ("lms", {"order": 4}, 4),
    ("deis", {"order": 2}, 2), ("deis", {"order": 3}, 3),
    ("dpm_solver_1", {}, 1), ("dpm_solver_2", {}, 2), ("dpm_solver_3", {}, 3), ("dpm_solver_2m", {}, 2),
    ("dpm_solver_3m", {}, 3), ("dpmpp_2s", {}, 2), ("dpmpp_3s", {}, 3), ("dpmpp_2m", {}, 2), ("dpmpp_3m", {}, 3),
    ("dpmpp_3m", {"half_curvature": True}, 2),
    ("unipc", {"order": 1}, 2), ("unipc", {"order": 2}, 3), ("unipc", {"order": 3}, 4),
    ("unipc", {"order": 2, "corrector": False}, 2), ("unipc", {"order": 3, "corrector": False}, 3),
]  # fmt: skip
STOCHASTIC = [("ddpm", {}, 1), ("ddim", {"eta": 1.0}, 1), ("euler_ancestral", {}, 1), ("sde_dpmpp_2m", {}, 2)]
PLOTTED = ("ddim", "heun", "plms", "lms(order=4)", "deis(order=3)", "dpmpp_2m", "dpmpp_3m",
           "dpmpp_3m(half_curvature=True)", "unipc(order=2)", "unipc(order=3)")  # fmt: skip


def denoise(x, t):
    alpha, sigma = SCHEDULE.alpha_sigma(t)
    var = alpha**2 * S2 + sigma**2
    return MU * np.tanh(alpha * MU * x / var) * (sigma**2 / var) + alpha * S2 * x / var


def run(table, x):
    """solvers/table.py's recurrence, without noise."""
    history = [np.zeros_like(x)] * table.memory
    for n in range(len(table)):
        history = [denoise(x, table.t[n]) + table.P[n] * x, *history][: table.memory]
        x = table.A[n] * x + sum(b * h for b, h in zip(table.B[n], history, strict=True))
    return x


def window(steps, ramp=0):
    """The grid from lambda = -4 to 4, landing on its last point."""
    l = np.linspace(-4, 4, steps + 1)
    if ramp:
        l = np.concatenate([l[:1], l[0] + (l[1] - l[0]) * 2.0 ** np.arange(-ramp, 0), l[1:]])
    grid = grids.from_times(SCHEDULE, SCHEDULE.inverse(l))
    return grid._replace(t=grid.t[:-1], alpha=grid.alpha[:-1], sigma=grid.sigma[:-1])


def exact(grid):
    """The flow carries each point to the same quantile of the marginal at its end."""

    def cdf(x, n):
        sd = np.hypot(grid.alpha[n] * np.sqrt(S2), grid.sigma[n])
        return (norm.cdf(x, grid.alpha[n] * MU, sd) + norm.cdf(x, -grid.alpha[n] * MU, sd)) / 2

    return np.array([brentq(lambda y, x=x: cdf(y, -1) - cdf(x, 0), -8, 8, xtol=1e-15, rtol=1e-15) for x in X])


def variance_error(table, grid, s2=0.3):
    """|variance - exact| of what the table makes of data N(0, s2), from the exact marginal."""
    K = table.memory
    V = np.zeros((K + 1, K + 1))  # of the state and K remembered predictions
    V[0, 0] = grid.alpha[0] ** 2 * s2 + grid.sigma[0] ** 2
    for n in range(len(table)):
        alpha, sigma = SCHEDULE.alpha_sigma(table.t[n])
        see = np.eye(K + 1, k=-1)
        see[0, 0], see[1, 0] = 1, alpha * s2 / (alpha**2 * s2 + sigma**2) + table.P[n]
        move = np.eye(K + 1)
        move[0] = table.A[n], *table.B[n]
        V = (move @ see) @ V @ (move @ see).T
        V[0, 0] += table.C[n] ** 2
    return abs(V[0, 0] - (grid.alpha[-1] ** 2 * s2 + grid.sigma[-1] ** 2))


def measure(solver, options, stochastic, ramp=0):
    """[(evaluations, error)] over STEPS."""
    points = []
    for n in STEPS:
        grid = window(n, ramp)
        more = {"lower_order_final": False} if solver in KEEP_ORDER else {}
        table = jd.solvers.make(solver, SCHEDULE, grid=grid, **options, **more)
        error = variance_error(table, grid) if stochastic else np.max(np.abs(run(table, X) - exact(grid)))
        points.append((len(table), float(error)))
    return points


KEEP_ORDER = {"plms", "pndm", "lms", "deis", "dpmpp_2m", "dpmpp_3m", "dpm_solver_2m", "dpm_solver_3m", "unipc",
              "sde_dpmpp_2m"}  # fmt: skip


def slope(points):
    """Of the finest three doublings whose errors are above rounding."""
    clear = [(n, e) for n, (_, e) in zip(STEPS, points, strict=True) if e > 1e-11][-3:]
    return -np.polyfit(*np.log(np.array(clear)).T, 1)[0]


def plot(results, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    for i, (label, points) in enumerate((k, results[k]) for k in PLOTTED if k in results):
        axes.plot(*zip(*points, strict=True), marker="os^vD"[i % 5], ms=4, lw=1.3, color=f"C{i % 10}", label=label)
    for order, at in ((1, 2e-1), (2, 2e-1), (3, 4e-1), (4, 2)):
        n = np.array([16, 512])
        axes.plot(n, at * (n / 8.0) ** -order, color="0.75", lw=0.8, ls=":", zorder=0)
        axes.annotate(f"{order}", (n[1], at * (n[1] / 8.0) ** -order), color="0.5", fontsize=8)
    axes.set(xscale="log", yscale="log", ylim=(1e-11, None), xlabel="evaluations",
             ylabel="largest error against the exact ODE", title="Orders on a mixture of Gaussians")  # fmt: skip
    axes.set_xticks(STEPS, [str(n) for n in STEPS])
    axes.minorticks_off()
    axes.grid(alpha=0.2)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="solver_orders.png", help="the plot (default: %(default)s)")
    parser.add_argument("--page", help="Markdown page to put the table into, between its <!-- orders --> comments")
    args = parser.parse_args()
    head = ["solver", "order", "measured", "with its start refined", "error at 16 steps", "evaluations of 16 steps"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    results = {}
    for stochastic, cases in ((False, DETERMINISTIC), (True, STOCHASTIC)):
        for solver, options, order in cases:
            label = solver + (f"({', '.join(f'{k}={v}' for k, v in options.items())})" if options else "")
            points = results[label] = measure(solver, options, stochastic)
            evaluations, error = points[STEPS.index(16)]
            what = f"{order}, of the variance" if stochastic else order
            refined = "" if stochastic or order < 3 else f"{slope(measure(solver, options, False, RAMP)):.2f}"
            lines.append(f"| `{label}` | {what} | {slope(points):.2f} | {refined} | {error:.1e} | {evaluations} |")
            print(lines[-1], flush=True)
    plot(results, args.out)
    if args.page:
        page.insert(args.page, "orders", "\n".join(lines))


if __name__ == "__main__":
    main()
