"""The multistep and exponential solvers on an exact Gaussian. See also test_peers_multistep.py."""

import functools
import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_diffusion import schedules
from jax_diffusion.errors import UserError
from jax_diffusion.solvers import grids, make, sample
from jax_diffusion.solvers.exponential import DATA, integrals, multistep

from .toys import gaussian_denoiser, moments, window

MU, S2 = 0.4, 0.3

# label: (solver, options, order)
ORDERS = {
    "lms-1": ("lms", {"order": 1}, 1),
    "lms-2": ("lms", {"order": 2}, 2),
    "lms-3": ("lms", {"order": 3}, 3),
    "lms-4": ("lms", {"order": 4}, 4),
    "plms": ("plms", {}, 2),  # the paper's "pseudo": see test_pndm_is_classical_where_steps_are_equal
    "pndm": ("pndm", {}, 2),
    "deis-1": ("deis", {"order": 1}, 1),
    "deis-2": ("deis", {"order": 2}, 2),
    "deis-3": ("deis", {"order": 3}, 3),
    "dpm_solver_1": ("dpm_solver_1", {}, 1),
    "dpm_solver_2": ("dpm_solver_2", {}, 2),
    "dpm_solver_2-heun": ("dpm_solver_2", {"solver_type": "heun"}, 2),
    "dpm_solver_2-shared": ("dpm_solver_2", {"share_steps": True}, 2),
    "dpm_solver_3": ("dpm_solver_3", {}, 3),
    "dpm_solver_3-heun": ("dpm_solver_3", {"solver_type": "heun"}, 3),
    "dpm_solver_2m": ("dpm_solver_2m", {}, 2),
    "dpm_solver_2m-heun": ("dpm_solver_2m", {"solver_type": "heun"}, 2),
    "dpm_solver_3m": ("dpm_solver_3m", {}, 3),
    "dpm_solver_3m-peers": ("dpm_solver_3m", {"half_curvature": True}, 2),  # an order lost by their weight
    "dpmpp_2s": ("dpmpp_2s", {}, 2),
    "dpmpp_2s-heun": ("dpmpp_2s", {"solver_type": "heun"}, 2),
    "dpmpp_3s": ("dpmpp_3s", {}, 3),
    "dpmpp_3s-heun": ("dpmpp_3s", {"solver_type": "heun"}, 3),
    "dpmpp_3s-shared": ("dpmpp_3s", {"share_steps": True}, 3),
    "dpmpp_2m-heun": ("dpmpp_2m", {"solver_type": "heun"}, 2),
    "dpmpp_3m": ("dpmpp_3m", {}, 3),
    "dpmpp_3m-peers": ("dpmpp_3m", {"half_curvature": True}, 2),
    # p + 1: a corrector raises its predictor's order by one (Zhao et al. 2023, theorem 3.1).
    **{
        f"unipc-{p}-{b}{'' if x0 else '-noise'}": (
            "unipc", {"order": p, "solver_type": b, "predict_x0": x0, "lower_order_final": False}, p + 1
        )
        for p, b, x0 in itertools.product((1, 2, 3), ("bh1", "bh2"), (True, False))
    },
    **{
        f"unip-{p}": ("unipc", {"order": p, "corrector": False, "lower_order_final": False}, p) for p in (1, 2, 3)
    },
}  # fmt: skip


def run(table, schedule, x):
    """The table's rows in NumPy float64, on data N(MU, S2)."""
    history = [np.zeros_like(x)] * table.memory
    for n in range(len(table)):
        a, s = schedule.alpha_sigma(table.t[n])
        D = MU + a * S2 * (x - a * MU) / (a * a * S2 + s * s)
        history = [D + table.P[n] * x, *history][: table.memory]
        x = table.A[n] * x + sum(b * h for b, h in zip(table.B[n], history, strict=True))
    return x


def error(table_of, schedule, log_snr):
    """Largest distance from the exact probability-flow solution along a grid of log SNR that ends above sigma = 0."""
    grid = window(schedule, schedule.inverse(log_snr))
    x = np.linspace(-2, 2, 5)
    (at, au), (st, su) = grid.alpha[[0, -1]], grid.sigma[[0, -1]]
    exact = au * MU + (x - at * MU) * np.sqrt((au**2 * S2 + su**2) / (at**2 * S2 + st**2))
    return np.max(np.abs(run(table_of(grid), schedule, x) - exact))


def slow_start(n, lo=-4.0, hi=4.0):
    """n equal steps from lo to hi, of which the first is cut in parts that double from h^2 on.

    A multistep method of order p begins with steps of lower order. Equal steps would make them errors of order 2,
    and these are small without being of very different length from one to the next.
    """
    h = (hi - lo) / n
    parts = [h]
    while parts[0] > h * h / 2:
        parts = [parts[0] / 2, parts[0] / 2, *parts[1:]]
    return np.concatenate([[lo], lo + np.cumsum(parts), np.linspace(lo, hi, n + 1)[2:]])


def equal(n, lo=-4.0, hi=4.0):
    return np.linspace(lo, hi, n + 1)


def observed_order(table_of, schedule, grid, steps):
    errors = [error(table_of, schedule, grid(n)) for n in steps]
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0], errors


@pytest.mark.parametrize("name", ["vp", "edm", "flow", "linear"])
@pytest.mark.parametrize("label", list(ORDERS))
def test_order_of_convergence(label, name):
    solver, options, order = ORDERS[label]
    schedule = schedules.make(name)
    steps = [48, 96, 192] if order > 3 else [96, 192, 384]  # above float64's rounding
    # A stride cut short at the end would be a step of lower order; these numbers divide by 2 and 3.
    grid = equal if options.get("share_steps") else slow_start
    got, errors = observed_order(lambda g: make(solver, schedule, grid=g, **options), schedule, grid, steps)
    assert got == pytest.approx(order, abs=0.25), errors


@pytest.mark.parametrize(("solver", "order"), [("plms", 3), ("pndm", 4)])
def test_pndm_is_classical_where_steps_are_equal(solver, order):
    """EDM's frame is u = t: Runge-Kutta and then Adams-Bashforth, both of order 4. PLMS begins with a trapezoid and
    steps of order 2 and 3, so no less than 3 in all."""
    edm = schedules.make("edm")

    def grid(n):
        return edm.log_snr(np.linspace(2.0, 0.2, n + 1))

    got, errors = observed_order(lambda g: make(solver, edm, grid=g), edm, grid, [96, 192, 384])
    assert got > order - 0.25, errors


@pytest.mark.parametrize("name", ["linear", "vp", "subvp", "edm", "flow"])
@pytest.mark.parametrize("label", list(ORDERS))
def test_a_right_denoiser_stays_on_its_path(label, name):
    """If D is always the true x_0, the state moves along alpha_t x_0 + sigma_t eps."""
    solver, options, _ = ORDERS[label]
    schedule = schedules.make(name)
    g = window(schedule, schedule.inverse(np.linspace(-3, 3, 8)))
    x0, eps = 0.7, -1.1
    table = make(solver, schedule, grid=g, **options)
    x, history = g.alpha[0] * x0 + g.sigma[0] * eps, [0.0] * table.memory
    for n in range(len(table)):
        history = [x0 + table.P[n] * x, *history][: table.memory]
        x = table.A[n] * x + table.B[n] @ history
    assert x == pytest.approx(g.alpha[-1] * x0 + g.sigma[-1] * eps, rel=1e-9)  # float64


OPTIONS = {
    "plms": [{"order": 2}, {"lower_order_final": False}],
    "pndm": [{"lower_order_final": False}],
    "lms": [{"order": 2}, {"lower_order_final": False}],
    "deis": [{"order": 1}, {"lower_order_final": False}],
    "dpm_solver_3": [{"solver_type": "heun"}, {"share_steps": True}],
    "dpmpp_2s": [{"share_steps": True}],
    "dpm_solver_3m": [{"solver_type": "midpoint", "lower_order_final": False}],
    "sde_dpmpp_3m": [{"eta": 0.5, "s_noise": 1.1, "lower_order_final": False}],
    "unipc": [
        {"order": p, "solver_type": b, "predict_x0": x0, "lower_order_final": final}
        for p, b, x0, final in itertools.product((1, 2, 3), ("bh1", "bh2"), (True, False), (True, False))
    ],
}


@pytest.mark.parametrize("name", sorted(set(schedules.SCHEDULES) - {"learned", "betas"}))
@pytest.mark.parametrize("solver", list(OPTIONS))
def test_options_leave_tables_finite(solver, name):
    """test_solvers.py says the same of every solver's defaults, and on the learned schedule."""
    schedule = schedules.make(name)
    for options, spacing, n in itertools.product(OPTIONS[solver], (None, "log_snr"), (1, 2, 3, 7)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            table = make(solver, schedule, n, spacing, **options)
        assert all(np.all(np.isfinite(c)) for c in jax.tree.leaves(table))
        if options.get("lower_order_final", True) or solver not in ("plms", "pndm", "lms"):
            assert table.A[-1] == table.C[-1] == 0
            np.testing.assert_allclose(table.B[-1], np.eye(1, table.memory)[0], atol=1e-12)


@pytest.mark.parametrize(("order", "options"), [(2, {"solver_type": "heun"}), (3, {})])
def test_multistep_dpm_solver_is_deis(order, options):
    """rho = e^-l: one integral in two papers' words."""
    grid = grids.make(schedules.make("linear"), 20)
    a = make(f"dpm_solver_{order}m", grid.schedule, grid=grid, **options)
    b = make("deis", grid.schedule, grid=grid, order=order)
    for column in "ABP":
        np.testing.assert_allclose(getattr(a, column), getattr(b, column), rtol=1e-12)


@pytest.mark.parametrize("solver", ["dpmpp_2m", "dpmpp_3m"])
def test_the_sde_solvers_without_noise_are_the_deterministic_ones(solver):
    grid = grids.make(schedules.make("vp"), 20)
    a, b = make(f"sde_{solver}", grid.schedule, grid=grid, eta=0.0), make(solver, grid.schedule, grid=grid)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def peers_third_order(z, k):
    """diffusers' weights of SDE-DPM-Solver++(3M), whose third has - 1/2 where the integral has + 1/2."""
    I = integrals(z, k)
    return [I[0], I[1], (-np.expm1(-z) - z) / z**2 - 0.5] if k == 3 else I


@pytest.mark.parametrize("name", ["vp", "edm", "flow"])
@pytest.mark.parametrize(
    ("table_of", "order"),
    [
        (lambda g: make("sde_dpmpp_2m", g.schedule, grid=g), 2),
        (lambda g: make("sde_dpmpp_2m", g.schedule, grid=g, eta=0.5), 2),
        (lambda g: make("sde_dpmpp_2m", g.schedule, grid=g, solver_type="heun"), 2),
        # Not 3: the differences of predictions see the noise of the steps between them.
        (lambda g: make("sde_dpmpp_3m", g.schedule, grid=g), 2),
        (lambda g: make("sde_dpmpp_3m", g.schedule, grid=g, eta=0.5), 2),
        (lambda g: make("sde_dpmpp_3m", g.schedule, grid=g, half_curvature=True), 2),
        # What test_sde_dpmpp_3m of test_peers_multistep.py repairs in the peer.
        (lambda g: multistep(g, DATA, 3, peers_third_order, True, "peer", eta=1.0), 1),
    ],
)
def test_the_sde_solvers_end_with_the_right_moments(table_of, order, name):
    """Mean and variance of N(MU, S2)'s marginal, computed and not sampled: the weak order of convergence."""
    schedule = schedules.make(name)
    errors = []
    for n in (96, 192, 384):
        grid = window(schedule, schedule.inverse(equal(n)))
        mean, variance = moments(table_of(grid), grid, MU, S2)
        a, s = grid.alpha[-1], grid.sigma[-1]
        assert mean == pytest.approx(a * MU, abs=1e-12)
        errors.append(abs(variance - (a * a * S2 + s * s)))
    got = -np.polyfit(np.log([96, 192, 384]), np.log(errors), 1)[0]
    assert got == pytest.approx(order, abs=0.25), errors


@functools.partial(jax.jit, static_argnums=0)
def program(name, table, x):
    return sample(jax.random.key(0), gaussian_denoiser(name, MU, S2), table, (1,), x=x)


@pytest.mark.parametrize("name", ["linear", "flow"])
@pytest.mark.parametrize(
    ("solver", "options"), [("plms", {}), ("lms", {}), ("deis", {}), ("unipc", {"predict_x0": False}), ("unipc", {})]
)
def test_float32_is_enough(solver, options, name):
    """What is remembered besides predictions, D - x / alpha, is large where alpha is small, and loses nothing."""
    schedule = schedules.make(name)
    table = make(solver, schedule, 20 if solver == "plms" else 21, **options).with_memory(5)
    x = np.random.default_rng(0).normal(size=(5, 1))
    got = program(name, table, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, run(table, schedule, x), rtol=1e-4, atol=2e-5)  # float32, over 21 rows


@pytest.mark.parametrize(
    ("solver", "memory"), [("plms", 5), ("pndm", 13), ("lms", 4), ("deis", 3), ("dpmpp_3m", 3), ("unipc", 4)]
)
def test_memory_does_not_grow_with_the_steps(solver, memory):
    """With predictions alone, combining three old eps would need all D since the first."""
    assert make(solver, schedules.make("linear"), 60).used_memory == memory


def test_integrals_by_quadrature():
    """Where the Taylor series and the recursion meet, too."""
    v, w = np.polynomial.legendre.leggauss(40)
    v, w = (v + 1) / 2, w / 2
    for z in (-3.0, -1.0, -0.999, -1e-3, 1e-9, 1e-3, 0.999, 1.0, 3.0):
        expected = [np.sum(w * v**j * z * np.exp(-z * (1 - v))) for j in range(4)]
        np.testing.assert_allclose(integrals(z, 4), expected, rtol=1e-12)
    assert integrals(np.inf, 4) == [1.0] * 4


@pytest.mark.parametrize(
    ("solver", "options", "says"),
    [
        ("unipc", {"order": 4}, "order=4 of solver 'unipc' must be a whole number from 1 to 3"),
        ("lms", {"order": 1.5}, "order=1.5 of solver 'lms' must be a whole number from 1 to 4"),
        ("dpmpp_2m", {"solver_type": "mid"}, "solver_type='mid' is unknown: did you mean 'midpoint'"),
        ("dpmpp_2s", {"solver_type": "bh1"}, "solver_type='bh1' is unknown: "),
        ("unipc", {"solver_type": "bh3"}, "solver_type='bh3' is unknown: "),
    ],
)
def test_mistakes(solver, options, says):
    with pytest.raises(UserError) as e:
        make(solver, schedules.make("vp"), 5, **options)
    assert says in str(e.value)
    assert "\n" not in str(e.value)
