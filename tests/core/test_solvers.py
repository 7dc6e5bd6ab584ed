"""Solvers as tables: orders of convergence on exact Gaussians, identities, marginals. See also test_peers.py."""

import dataclasses
import functools
import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_diffusion import schedules
from jax_diffusion.guidance import Denoised
from jax_diffusion.solvers import SOLVERS, grids, make, sample
from jax_diffusion.solvers.ddim import ddim
from jax_diffusion.solvers.ddpm import ddpm
from jax_diffusion.solvers.dpm2 import dpm2
from jax_diffusion.solvers.dpmpp import dpmpp_2m
from jax_diffusion.solvers.euler import euler
from jax_diffusion.solvers.heun import heun

from .toys import gaussian_denoiser, moments, window

ORDERS = {"ddim": (ddim, 1), "euler": (euler, 1), "heun": (heun, 2), "dpm2": (dpm2, 2), "dpmpp_2m": (dpmpp_2m, 2)}
MU, S2 = 0.4, 0.3


@functools.partial(jax.jit, static_argnums=0)
def run_float64(name, table, x):
    return sample(jax.random.key(0), gaussian_denoiser(name, MU, S2), table, (1,), x=x)


def padded(table, n=1024):
    """The table with rows that do nothing after its own, so that all are one compiled program."""
    more = n - len(table)

    def pad(c, value):
        return np.concatenate([c, np.full((more, *c.shape[1:]), value(c))])

    edge, zero, one = (lambda c: c[-1]), (lambda c: 0.0), (lambda c: 1.0)
    fill = {"t": edge, "A": one, "B": zero, "P": zero, "R": zero, "C": zero, "C_max": zero}
    return dataclasses.replace(table, **{f: pad(getattr(table, f), value) for f, value in fill.items()})


def error(solver, name, steps):
    """Largest distance from the exact probability-flow solution, between lambda = -4 and 4, in float64."""
    schedule = schedules.make(name)
    # Points crowd at neither end; a discrete model is visited between its integers.
    grid = window(schedule, schedule.inverse(np.linspace(-4, 4, steps + 1)))
    x = np.linspace(-2, 2, 5)[:, None]
    (at, au), (st, su) = grid.alpha[[0, -1]], grid.sigma[[0, -1]]
    exact = au * MU + (x - at * MU) * np.sqrt((au**2 * S2 + su**2) / (at**2 * S2 + st**2))
    with jax.enable_x64(True):
        got = run_float64(name, padded(solver(grid)), jnp.asarray(x, jnp.float64))
        assert got.dtype == jnp.float64
        return float(np.max(np.abs(np.asarray(got) - exact)))


@pytest.mark.parametrize("name", ["vp", "edm", "flow", "linear"])
@pytest.mark.parametrize("solver", sorted(ORDERS))
def test_order_of_convergence(solver, name):
    solve, order = ORDERS[solver]
    # Enough of them that the leading term is alone: on the flow Heun's first two terms cancel at about 30.
    steps = np.array([128, 256, 512])
    errors = np.array([error(solve, name, n) for n in steps])
    observed = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert observed == pytest.approx(order, abs=0.2), errors


@pytest.mark.parametrize("grid", [None, "karras", "log_snr"])
@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize("name", [*sorted(set(schedules.SCHEDULES) - {"learned", "betas"}), "learned"])
def test_every_table_is_finite_and_lands_on_the_last_prediction(name, solver, grid):
    """The last row is x_0 = D: no division by sigma = 0, no noise, whatever the schedule and the steps."""
    schedule = schedules.make(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tables = [make(solver, schedule, n, grid) for n in (1, 2, 5, 20)]
    for table in tables:
        for column in jax.tree.leaves(table):
            assert np.all(np.isfinite(column)) and column.dtype == np.float64
        assert table.A[-1] == table.C[-1] == table.C_max[-1] == 0
        np.testing.assert_allclose(table.B[-1], np.eye(1, table.B.shape[1])[0], atol=1e-12)
        if solver not in ("repaint", "restart"):  # those go back on purpose
            # An ancestral step's middle may be the next point itself, but for rounding (`learned` is float32).
            assert np.all(np.diff(table.t) <= 1e-6 * schedule.t_max)


@pytest.mark.parametrize("solver", sorted(ORDERS))
@pytest.mark.parametrize("name", ["linear", "vp", "subvp", "edm", "flow"])
def test_a_right_denoiser_stays_on_its_path(name, solver):
    """If D is always the true x_0, every deterministic table moves alpha_t x_0 + sigma_t eps along itself."""
    schedule = schedules.make(name)
    g = window(schedule, schedule.inverse(np.linspace(-3, 3, 8)))
    x0, eps = 0.7, -1.1
    table = SOLVERS[solver](g)
    x, history = g.alpha[0] * x0 + g.sigma[0] * eps, [0.0] * table.B.shape[1]
    for n in range(len(table)):
        history = [x0 + table.P[n] * x, *history][: table.B.shape[1]]
        x = table.A[n] * x + table.B[n] @ history
    assert x == pytest.approx(g.alpha[-1] * x0 + g.sigma[-1] * eps, rel=1e-10)  # float64


@pytest.mark.parametrize("name", ["linear", "vp", "edm", "flow", "subvp"])
def test_ddim_is_euler_in_the_straight_frame(name):
    """With x_0 and eps fixed the path is straight there (Karras et al. 2022, section 4), so both are one."""
    grid = grids.make(schedules.make(name), 10)
    a, b = ddim(grid), euler(grid)
    np.testing.assert_allclose(a.A, b.A, rtol=1e-9, atol=1e-12)  # float64
    np.testing.assert_allclose(a.B, b.B, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["linear", "cosine", "vp"])
def test_ddim_with_eta_one_is_ddpm(name):
    """Song et al. 2021, section 4.1: the same mean and the same noise as fixed_small."""
    grid = grids.make(schedules.make(name), 20)
    a, b = ddim(grid, eta=1.0), ddpm(grid)
    for column in ("A", "B", "C"):
        # float64; sigma_s^2 - c^2 cancels a few digits.
        np.testing.assert_allclose(getattr(a, column), getattr(b, column), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("name", ["linear", "vp", "edm", "flow"])
def test_ddim_keeps_the_marginals(name, eta):
    """eq. 7's condition: given x_0, a state at noise sigma_t goes to one at sigma_s, whatever eta."""
    grid = grids.make(schedules.make(name), 10)
    table = ddim(grid, eta)
    a, s = grid.alpha, grid.sigma
    # float64, with some cancellation in alpha_s - A alpha_t.
    np.testing.assert_allclose(table.A * a[:-1] + table.B[:, 0], a[1:], atol=1e-10)
    np.testing.assert_allclose((table.A * s[:-1]) ** 2 + table.C**2, s[1:] ** 2, rtol=1e-9, atol=1e-12)


# ---- stochastic solvers: the marginals ----

WEAK_ORDERS = [  # solver, options of a grid of n steps, order
    ("ddim", lambda n: {"eta": 1.0}, 1),
    ("ddpm", lambda n: {}, 1),
    ("euler_ancestral", lambda n: {}, 1),
    ("dpm2_ancestral", lambda n: {"eta": 0.5}, 2),
    ("dpm2_ancestral", lambda n: {}, 2),
    ("dpmpp_2s_ancestral", lambda n: {"eta": 0.5}, 2),
    ("dpmpp_2s_ancestral", lambda n: {}, 2),
    ("euler", lambda n: {"S_churn": 5.0}, 1),
    ("heun", lambda n: {"S_churn": 5.0}, 2),
    ("dpm2", lambda n: {"S_churn": 5.0}, 2),
    ("restart", lambda n: {"intervals": [(0.4, 3.0, n // 2, 2)]}, 2),
]


@pytest.mark.parametrize("name", ["vp", "edm", "flow", "linear"])
@pytest.mark.parametrize(("solver", "options", "order"), WEAK_ORDERS)
def test_weak_order_of_convergence(solver, options, order, name):
    """Mean and variance of what comes out tend to the data's as steps grow, with the order of the ODE step.

    Exactly, by recursion: no samples, so no noise. S_churn is all the noise added, spread over the steps.
    """
    schedule, steps, errors = schedules.make(name), np.array([64, 128, 256]), []
    for n in steps:
        grid = window(schedule, schedule.inverse(np.linspace(-4, 4, n + 1)))
        table = SOLVERS[solver](grid, **options(n))
        assert np.any(table.C)
        m, v = moments(table, grid, MU, S2)
        a, s = grid.alpha[-1], grid.sigma[-1]
        errors.append((m - a * MU, v - (a * a * S2 + s * s)))
    for e in np.abs(errors).T:  # of the mean, of the variance
        assert e[-1] < 1e-9 or -np.polyfit(np.log(steps), np.log(e), 1)[0] == pytest.approx(order, abs=0.2), errors


@pytest.mark.parametrize("solver", ["ddim", "euler_ancestral", "dpm2_ancestral", "dpmpp_2s_ancestral"])
@pytest.mark.parametrize("name", ["linear", "vp", "edm", "flow"])
def test_ancestral_steps_keep_the_marginals(name, solver):
    """With D the true x_0, a state at noise sigma_t goes to one at sigma_s: noise taken is noise given back."""
    schedule = schedules.make(name)
    grid = grids.make(schedule, 10)
    table = SOLVERS[solver](grid, eta=0.7)
    x0, mean, variance, history = 0.7, grid.alpha[0] * 0.7, grid.sigma[0] ** 2, [0.0] * table.memory
    for n in range(len(table)):
        history = [x0, *history][: table.memory]
        mean = table.A[n] * mean + table.B[n] @ history
        variance = table.A[n] ** 2 * variance + table.C[n] ** 2
        if table.C[n]:
            i = int(np.argmin(np.abs(grid.t - table.t[n + 1])))  # the point this step leads to
            assert mean == pytest.approx(grid.alpha[i] * x0, rel=1e-8, abs=1e-8)  # float64, some cancellation
            assert variance == pytest.approx(grid.sigma[i] ** 2, rel=1e-8)


@pytest.mark.parametrize("S_churn", [1.0, 1e9])
@pytest.mark.parametrize("solver", ["euler", "heun", "dpm2"])
@pytest.mark.parametrize("name", sorted(set(schedules.SCHEDULES) - {"learned", "betas"}))
def test_churned_tables_are_finite_and_land_on_the_last_prediction(name, solver, S_churn):
    table = make(solver, schedules.make(name), 7, S_churn=S_churn)
    assert np.any(table.C) and table.A[-1] == table.C[-1] == 0
    np.testing.assert_allclose(table.B[-1], np.eye(1, table.memory)[0], atol=1e-12)


# ---- DDPM on a correlated Gaussian ----

MEAN = np.array([0.5, -1.0])
COV = np.array([[0.5, 0.3], [0.3, 0.4]])
BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
LARGE = {"fixed_small": False, "fixed_large": True}


def correlated(x, t):
    """E[x_0 | x_t] of N(MEAN, COV); W is a small matrix made in the trace from alpha(t)."""
    b = jnp.asarray(BAR, jnp.float32)[t.astype(int)]
    cov = jnp.asarray(COV, jnp.float32)
    W = jnp.sqrt(b) * jnp.linalg.solve(b * cov + (1 - b) * jnp.eye(2), cov)
    return MEAN.astype(np.float32)[None] + (x - jnp.sqrt(b) * MEAN.astype(np.float32)[None]) @ W


def exact_chain(t, large):
    """Mean and covariance after DDPM's algorithm 2 through times t, by hand from eq. 6-7 in float64."""
    bars = np.append(BAR[t.astype(int)], 1.0)
    m, C = np.zeros(2), np.eye(2)
    for b, prev in itertools.pairwise(bars):
        W = np.sqrt(b) * np.linalg.solve(b * COV + (1 - b) * np.eye(2), COV)
        beta = 1 - b / prev
        w_0, w_x = np.sqrt(prev) * beta / (1 - b), np.sqrt(b / prev) * (1 - prev) / (1 - b)
        M = w_x * np.eye(2) + w_0 * W.T
        m = M @ m + w_0 * (MEAN - W.T @ (np.sqrt(b) * MEAN))
        noise = 0 if prev == 1 else beta if large else beta * (1 - prev) / (1 - b)
        C = M @ C @ M.T + noise * np.eye(2)
    return m, C


@pytest.mark.parametrize("variance", sorted(LARGE))
def test_a_thousand_exact_steps_reach_the_data(variance):
    """The chain the sampler is compared with below is itself right: its bias vanishes at T steps."""
    m, C = exact_chain(np.arange(1000)[::-1], LARGE[variance])
    np.testing.assert_allclose(m, MEAN, atol=0.02)  # the prior's mismatch, sqrt(alpha_bar_T) = 0.006
    np.testing.assert_allclose(C, COV, atol=0.01)  # steps of 1e-3


@pytest.mark.parametrize("steps", [12, 40])
@pytest.mark.parametrize("variance", sorted(LARGE))
def test_ancestral_samples_have_the_chains_mean_and_covariance(variance, steps):
    n = 4000
    table = make("ddpm", schedules.make("linear"), steps, variance=variance)
    x = jax.jit(lambda t: sample(jax.random.key(7), correlated, t, (2,), indices=jnp.arange(n)))(table)
    m, C = exact_chain(table.t, LARGE[variance])
    # 4.5 standard errors of a mean, and of a covariance: var(C_ij) = (C_ii C_jj + C_ij^2) / n.
    d = np.diag(C)
    assert np.all(np.abs(np.mean(x, 0) - m) < 4.5 * np.sqrt(d / n))
    assert np.all(np.abs(np.cov(x.T) - C) < 4.5 * np.sqrt((np.outer(d, d) + C**2) / n))


@pytest.mark.parametrize(("v", "variance"), [(0.0, "fixed_small"), (1.0, "fixed_large")])
def test_learned_variance_ends_at_the_fixed_ones(v, variance):
    s = schedules.make("linear")

    def learned(x, t):
        return Denoised(correlated(x, t), jnp.full_like(x, v))

    def run(denoise, kind):
        table = make("ddpm", s, 12, variance=kind)
        return sample(jax.random.key(1), denoise, table, (2,), indices=jnp.arange(16))

    np.testing.assert_allclose(run(learned, "learned"), run(correlated, variance), atol=1e-5)  # exp(log C)


def test_learned_variance_is_geometric_between():
    table = make("ddpm", schedules.make("linear"), 12, variance="learned")
    small, large = (make("ddpm", schedules.make("linear"), 12, variance=k) for k in LARGE)
    np.testing.assert_array_equal((table.C, table.C_max), (small.C, large.C))

    def half(x, t):
        return Denoised(jnp.zeros_like(x), jnp.full_like(x, 0.5))

    # One step from zero state with D = 0 leaves the noise alone; its scale is the geometric mean (eq. 15).
    def one(table, denoise):
        row = jax.tree.map(lambda c: c[:1] if np.ndim(c) else c, table)
        return sample(jax.random.key(2), denoise, row, (2,), x=jnp.zeros((4, 2)), indices=jnp.arange(4))

    pure = one(small, lambda x, t: jnp.zeros_like(x)) / small.C[0]
    np.testing.assert_allclose(one(table, half), pure * np.sqrt(small.C[0] * large.C[0]), rtol=1e-5)  # float32
