"""Solvers that are not tables: adaptive Runge-Kutta and DPM-Solver, predictor-corrector."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from jax_diffusion import schedules
from jax_diffusion.errors import UserError
from jax_diffusion.shapes import per_sample
from jax_diffusion.solvers import METHODS, grids, make, sample
from jax_diffusion.solvers.frame import Frame

MU, S2 = 0.4, 0.3
NAMES = ["vp", "edm", "flow", "linear"]


def made(name):
    return schedules.make("linear", zero_terminal_snr=True) if name == "zero_terminal_snr" else schedules.make(name)


def denoiser(schedule, mu=MU, s2=S2):
    """E[x_0 | x_t] of N(mu, s2), t [] or [B]."""

    def denoise(x, t):
        a, s = (per_sample(c, x) for c in schedule.alpha_sigma(jnp.asarray(t, jnp.float32)))
        return mu + a * s2 * (x - a * mu) / (a * a * s2 + s * s)

    return denoise


def flow_map(schedule, t, u):
    """x_t -> x_u of the probability-flow ODE, exact in float64."""
    (at, st), (au, su) = (schedule.alpha_sigma(np.float64(c)) for c in (t, u))
    shrink = np.sqrt((au**2 * S2 + su**2) / (at**2 * S2 + st**2))
    return lambda x: au * MU + (np.asarray(x, np.float64) - at * MU) * shrink


def start(schedule, n=5):
    return jnp.asarray(schedule.prior_scale * np.linspace(-2, 2, n)[:, None], jnp.float32)


def solve(solver, schedule, x):
    return jax.jit(lambda solver, x: solver.solve(None, denoiser(schedule), x))(solver, x)


@pytest.mark.parametrize("name", [*sorted(set(schedules.SCHEDULES) - {"betas"}), "zero_terminal_snr"])
def test_the_frame_is_that_of_the_tables_grids(name):
    """t(w) and s(w) in float32 against the grid's float64, ends included (a flow begins with alpha = 0)."""
    schedule = made(name)
    frame, grid = Frame.of(schedule), grids.make(schedule, 40, "uniform")
    u, s = (c[:-1] for c in grid.straight)
    t = np.append(grid.t, frame.last_time)
    w = np.array([frame.w(c) for c in t])
    np.testing.assert_allclose(np.exp(w[:-1]), u, rtol=2e-6)  # the learned schedule is float32 itself
    got_t, got_s = frame.point(jnp.asarray(w, jnp.float32))
    # The noise level of the time found, in float64: w has an absolute error of 5e-7, t a relative one of 1e-7.
    np.testing.assert_allclose([frame.w(c) for c in np.asarray(got_t, np.float64)], w, atol=3e-5)
    np.testing.assert_allclose(got_s[:-1], s, rtol=3e-5)
    assert np.all((got_t >= schedule.t_min) & (got_t <= schedule.t_max))


@pytest.mark.parametrize("name", [*NAMES, "cosine", "subvp", "zero_terminal_snr"])
def test_rk45_is_the_exact_solution(name):
    """To a few times the tolerance: errors made early are carried along, and contract where this ODE does."""
    schedule = made(name)
    x = start(schedule)
    solver = make("rk45", schedule, 20, rtol=1e-5, atol=1e-5, final="min")
    got, used = solve(solver, schedule, x)
    exact = flow_map(schedule, schedule.t_max, solver.frame.last_time)(x)
    D = denoiser(schedule)(jnp.asarray(exact, jnp.float32), jnp.float32(solver.frame.last_time))
    lands = name == "flow"  # whose t_min is sigma = 0 itself
    np.testing.assert_allclose(got, D if lands else exact, atol=1e-4)
    assert used.dtype == jnp.int32 and np.all(used < 250)
    landed, more = solve(make("rk45", schedule, 20, rtol=1e-5, atol=1e-5), schedule, x)
    np.testing.assert_allclose(landed, D, atol=1e-4)
    np.testing.assert_array_equal(more, used + (not lands))


@pytest.mark.parametrize("method", ["rk45", "rk23"])
def test_steps_are_scipys(method):
    """The same pair, control and first step: as many evaluations, and the same value. One sample, one number."""
    schedule = schedules.make("vp")
    solver = make(method, schedule, 10, rtol=1e-4, atol=1e-5, final="min")
    w0, w1 = float(solver.start), float(solver.end)

    def slope(w, y):
        u2 = np.exp(2 * w)
        return y - (MU + S2 * (y - MU) / (S2 + u2))

    x = start(schedule, 4)
    got, used = solve(solver, schedule, x)
    a0, aT = (float(schedule.alpha(np.float64(t))) for t in (schedule.t_min, schedule.t_max))
    for i in range(4):
        peer = solve_ivp(
            slope, (w0, w1), np.asarray(x[i], np.float64) / aT, method.upper(),
            rtol=1e-4, atol=1e-5, first_step=(w0 - w1) / 10,
        )  # fmt: skip
        # A step accepted by one and not by the other would be float32's doing: at most one.
        assert abs(int(used[i]) - peer.nfev) <= (6 if method == "rk45" else 3)
        assert float(got[i, 0]) == pytest.approx(a0 * peer.y[0, -1], abs=2e-5)


def test_a_finer_tolerance_costs_more_and_errs_less():
    schedule = schedules.make("vp")
    x, errors, cost = start(schedule), [], []
    for tolerance in (1e-3, 1e-4, 1e-5):
        solver = make("rk45", schedule, 20, rtol=tolerance, atol=tolerance, final="min")
        got, used = solve(solver, schedule, x)
        errors.append(np.abs(got - flow_map(schedule, schedule.t_max, solver.frame.last_time)(x)).max())
        cost.append(used.mean())
    assert errors[0] > 3 * errors[1] > 9 * errors[2] and cost[0] < cost[1] < cost[2]


@pytest.mark.parametrize("name", NAMES)
def test_encoding_and_decoding_are_each_others_inverse(name):
    schedule = schedules.make(name)
    solver = make("rk45", schedule, 20, rtol=1e-5, atol=1e-5)
    x0 = jnp.linspace(-1, 1, 6)[:, None]
    D = denoiser(schedule)
    latent, _ = jax.jit(lambda s, x: s.encode(D, x))(solver, x0)
    back, _ = jax.jit(lambda s, x: s.decode(D, x))(solver, latent)
    np.testing.assert_allclose(back, x0, atol=3e-4)  # the tolerance, of latents up to 160 times as large
    least = solver.frame.last_time
    exact = flow_map(schedule, least, schedule.t_max)(schedule.alpha(np.float64(least)) * np.asarray(x0))
    np.testing.assert_allclose(latent, exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["rk45", "rk23", "dpm_adaptive"])
def test_a_sample_does_not_depend_on_its_batch(method):
    """Neither its value nor its evaluations: companions that need more steps leave it alone."""
    schedule = schedules.make("vp")
    solver = make(method, schedule, 20, rtol=1e-3, atol=1e-4)
    easy, hard = start(schedule, 2), 40 * start(schedule, 3)
    alone, cost = (c[:2] for c in solve(solver, schedule, jnp.concatenate([easy, easy[:1], easy])))
    together, costs = solve(solver, schedule, jnp.concatenate([easy, hard]))
    np.testing.assert_allclose(together[:2], alone, rtol=1e-6)
    np.testing.assert_array_equal(costs[:2], cost)
    assert len(set(costs.tolist())) > 1


@pytest.mark.parametrize("method", ["rk45", "dpm_adaptive"])
def test_too_few_evaluations_are_not_passed_off_as_a_sample(method):
    schedule = schedules.make("vp")
    got, used = solve(make(method, schedule, 20, max_evaluations=20), schedule, start(schedule))
    assert np.all(np.isnan(got)) and np.all(used <= 21)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_dpm_adaptive_errs_less_at_a_finer_tolerance(name, order):
    schedule = schedules.make(name)
    x, errors, cost = start(schedule), [], []
    for part in (1, 1 / 64, 1 / 512):  # in between, which steps are accepted is luck, and LARGEST_STEP has its say
        solver = make("dpm_adaptive", schedule, 1, order=order, rtol=0.05 * part, atol=0.0078 * part)
        got, used = solve(solver, schedule, x)
        last = solver.frame.last_time
        exact = flow_map(schedule, schedule.t_max, last)(x)
        errors.append(np.abs(got - denoiser(schedule)(jnp.asarray(exact, jnp.float32), jnp.float32(last))).max())
        cost.append(used.mean())
    assert errors[0] > 1.5 * errors[1] and errors[1] > 1.5 * errors[2] and errors[2] < 0.002, errors
    assert cost == sorted(cost) and all((c - 1) % order == 0 for c in used.tolist())


@pytest.mark.parametrize("order", [2, 3])
def test_dpm_adaptives_pair_has_its_two_orders(order):
    """One step of h: the local errors fall as h^(k+1), k being the order of either."""
    from jax_diffusion.solvers.dpm_adaptive import _STEPS

    schedule = schedules.make("edm")
    frame, w = Frame.of(schedule), np.log(0.7)
    steps = np.array([0.4, 0.2])
    y, ends = jnp.full((2, 1), 0.9), jnp.asarray(steps, jnp.float32)
    lower, higher = _STEPS[order](frame, denoiser(schedule), y, jnp.full((2,), w, jnp.float32), ends)
    exact = [flow_map(schedule, 0.7, 0.7 * np.exp(-h))(0.9) for h in steps]
    for got, k in ((lower, order - 1), (higher, order)):
        error = np.abs(np.asarray(got)[:, 0] - exact)
        assert np.log2(error[0] / error[1]) == pytest.approx(k + 1, abs=0.4), error


# ---- predictor-corrector ----


@pytest.mark.parametrize("name", ["vp", "flow", "linear"])
@pytest.mark.parametrize("predictor", ["ddpm", "euler"])
def test_the_corrector_mends_the_predictors_variance(predictor, name):
    schedule = schedules.make(name)
    shape, n = (512,), 16

    def moments(solver):
        run = jax.jit(lambda s: sample(jax.random.key(3), denoiser(schedule), s, shape, indices=jnp.arange(n)))
        x = np.asarray(run(solver), np.float64)
        return x.mean(), x.var()

    plain = moments(make(predictor, schedule, 10))
    mended = moments(make("predictor_corrector", schedule, 10, predictor=predictor, n_corrector=4))
    assert abs(plain[0] - MU) < 0.02 and abs(mended[0] - MU) < 0.02
    # Ten steps lose a sixth of the variance or more; its standard error is 0.005.
    assert S2 - plain[1] > 0.05 and abs(mended[1] - S2) < 0.8 * (S2 - plain[1]), (plain, mended)


def test_many_langevin_steps_have_the_marginals_variance():
    """One level, no predictor: x' = (1 - 2 r^2) x + 2 r sqrt(v) z is stationary at v / (1 - r^2) (snr = r)."""
    schedule, r, v = schedules.make("edm"), 0.3, S2 + 0.5**2
    solver = make("predictor_corrector", schedule, 1, [0.5], predictor="none", snr=r, n_corrector=60)
    # The last row denoises: D = MU + S2 / v (x - MU).
    run = jax.jit(lambda s: sample(jax.random.key(0), denoiser(schedule), s, (2000,), indices=jnp.arange(16)))
    x = (np.asarray(run(solver), np.float64) - MU) * v / S2
    assert abs(x.mean()) < 4 * np.sqrt(v / x.size)
    assert x.var() == pytest.approx(v / (1 - r**2), rel=0.035)  # 4.5 standard errors, sqrt(2 / 32000), and 1/2000


def test_predictor_corrector_is_a_scan_of_its_rows():
    schedule = schedules.make("linear")
    solver = make("predictor_corrector", schedule, 5, n_corrector=2)
    assert len(solver) == 5 + 4 * 2 and solver.C[-1] == 0 and solver.A[-1] == 0
    assert len(make("predictor_corrector", schedule, 5, predictor="none", n_corrector=3)) == 16
    traced = []

    def denoise(x, t):
        traced.append(t)
        return denoiser(schedule)(x, t)

    run = jax.jit(lambda s: sample(jax.random.key(0), denoise, s, (3,), trajectory=True))
    x, film = run(solver)
    assert film.shape == (13, 1, 3)
    np.testing.assert_array_equal(x, film[-1])
    other = run(make("predictor_corrector", schedule, 5, predictor="ddim", snr=0.1, n_corrector=2))[0]
    assert len(traced) == 1 and not np.allclose(x, other)


def test_predictor_corrector_samples_do_not_depend_on_their_batch():
    schedule = schedules.make("vp")
    solver = make("predictor_corrector", schedule, 6)

    @jax.jit
    def run(indices):
        return sample(jax.random.key(0), denoiser(schedule), solver, (40,), indices=indices)

    np.testing.assert_allclose(run(jnp.arange(4))[2], run(jnp.array([2, 7, 8, 9]))[0], rtol=1e-5)


# ---- all of them ----


@pytest.mark.parametrize("method", ["rk45", "dpm_adaptive"])
def test_another_tolerance_is_the_same_program(method):
    schedule, traces = schedules.make("cosine"), []

    @jax.jit
    def run(solver):
        traces.append(solver)
        return sample(jax.random.key(0), denoiser(schedule), solver, (2,), indices=jnp.arange(3))

    a, b = (run(make(method, schedule, n, rtol=r, atol=r)) for n, r in ((20, 1e-2), (10, 1e-4)))
    assert len(traces) == 1 and a.shape == (3, 2) and not np.array_equal(a, b)


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("rk45", {"rtol": 1e-9}, "rtol=1e-09"),
        ("rk45", {"atol": 0.0}, "atol=0"),
        ("rk23", {"max_evaluations": 3}, "max_evaluations=3"),
        ("dpm_adaptive", {"order": 4}, "order=4"),
        ("dpm_adaptive", {"rtol": -1.0}, "rtol=-1"),
        ("predictor_corrector", {"snr": 0}, "snr=0"),
        ("predictor_corrector", {"n_corrector": 0}, "n_corrector=0"),
        ("predictor_corrector", {"predictor": "heun"}, "predictor='heun'"),
        ("predictor_corrector", {"n_corector": 2}, "did you mean 'n_corrector'"),
    ],
)
def test_mistakes(method, options, words):
    with pytest.raises(UserError, match=words):
        make(method, schedules.make("vp"), 10, **options)


@pytest.mark.parametrize("method", ["rk45", "dpm_adaptive"])
def test_adaptive_solvers_have_no_trajectory(method):
    schedule = schedules.make("vp")
    with pytest.raises(UserError, match="trajectory=True"):
        sample(jax.random.key(0), denoiser(schedule), make(method, schedule, 10), (1,), trajectory=True)


def test_all_methods_are_tested_here():
    assert set(METHODS) == {"rk45", "rk23", "dpm_adaptive", "predictor_corrector"}
