"""Churn, restarts, DPM-Solver++(2S) ancestral: the papers' algorithms written out in NumPy, and diffusers."""

import itertools

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jax_diffusion import schedules
from jax_diffusion.errors import UserError
from jax_diffusion.solvers import grids, make, noise, sample_keys

from .float64_peers import ROUNDING, between, inject, peers_in_float64, row_noises, scheduler  # noqa: F401
from .test_peers import INDICES, KEY, LINEAR, X, net, ours

pytestmark = pytest.mark.usefixtures("peers_in_float64")


# ---- churn ----


def edm_denoise(x, s, xp=np):
    """Karras et al. 2022, table 1, around the toy network."""
    total = s * s + 0.25
    f = net(x / xp.sqrt(total), 300 * xp.log(s), xp)
    return 0.25 / total * x + 0.5 * s / xp.sqrt(total) * f


def edm_jax(x, s):
    return edm_denoise(x, s, jnp)


class Evaluations:
    """Counts evaluations, and hands out the noise that a table adds after the latest."""

    def __init__(self, denoise, table):
        self.f, self.n = denoise, 0
        self.noises = row_noises(table)
        self.start = np.asarray(noise.normal(sample_keys(KEY, INDICES), noise.ON_A_GIVEN_STATE, (4,)), np.float64)

    def denoise(self, x, sigma):
        self.n += 1
        return self.f(x, sigma)

    def noise(self):
        return self.noises[self.n - 1] if self.n else self.start


def algorithm_2(e, x, t, S_churn, S_tmin, S_tmax, S_noise, heun=True):
    """Karras et al. 2022, algorithm 2, line by line; t [N+1], the last 0."""
    N = len(t) - 1
    for i in range(N):
        gamma = min(S_churn / N, np.sqrt(2) - 1) if S_tmin <= t[i] <= S_tmax else 0
        t_hat = t[i] + gamma * t[i]
        if gamma > 0:
            x = x + np.sqrt(t_hat**2 - t[i] ** 2) * S_noise * e.noise()
        d = (x - e.denoise(x, t_hat)) / t_hat
        x_next = x + (t[i + 1] - t_hat) * d
        if heun and t[i + 1] != 0:
            d_prime = (x_next - e.denoise(x_next, t[i + 1])) / t[i + 1]
            x_next = x + (t[i + 1] - t_hat) * (d + d_prime) / 2
        x = x_next
    return x


CHURNS = [
    {"S_churn": 0.0, "S_tmin": 0.0, "S_tmax": np.inf, "S_noise": 1.0},
    {"S_churn": 3.0, "S_tmin": 0.0, "S_tmax": np.inf, "S_noise": 1.0},  # the first point's too
    {"S_churn": 40.0, "S_tmin": 0.05, "S_tmax": 50.0, "S_noise": 1.003},  # ImageNet's; gamma at its limit
]


@pytest.mark.parametrize("steps", [1, 9])
@pytest.mark.parametrize("options", CHURNS)
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_churn_is_algorithm_2(solver, options, steps):
    schedule = schedules.make("edm")
    table = make(solver, schedule, steps, **options)
    t = 80 ** (1 / 7) + np.arange(steps) / max(steps - 1, 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))  # eq. 5
    exact = algorithm_2(Evaluations(edm_denoise, table), 80 * X, [*(t**7), 0.0], **options, heun=solver == "heun")
    np.testing.assert_allclose(ours(table, edm_jax, 80 * X), exact, **ROUNDING)
    raised = options["S_churn"] and options["S_tmax"] > 80
    assert table.scale == pytest.approx(80 * (1 + min(options["S_churn"] / steps, np.sqrt(2) - 1) * bool(raised)))


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_churn_on_a_discrete_model_is_algorithm_2_on_its_sigmas(solver):
    """sigma / alpha takes the place of sigma, x / alpha that of x, and the raised time lies between the integers."""
    options = {"S_churn": 4.0, "S_tmin": 0.05, "S_tmax": 100.0, "S_noise": 1.01}
    grid = grids.make(LINEAR, 8, "leading")
    table = make(solver, LINEAR, grid=grid, **options)

    def f(x, sigma):
        t = LINEAR.inverse(-2 * np.log(sigma))
        a, s = LINEAR.alpha_sigma(t)
        return (a * x - s * net(a * x, t)) / a

    sigmas = grid.sigma / grid.alpha
    options["S_tmax"] = (sigmas[0] + sigmas[1]) / 2  # here the first point is never raised (straight.churn)
    exact = algorithm_2(Evaluations(f, table), X / grid.alpha[0], sigmas, **options, heun=solver == "heun")
    np.testing.assert_allclose(ours(table, between), exact, **ROUNDING)


def test_churn_stops_at_the_schedules_end():
    """Beyond t_max no network was trained; EDM alone goes on."""
    assert make("heun", LINEAR, grid=[999, 998, 10], S_churn=1e9).t.max() == 999
    assert make("heun", schedules.make("vp"), grid=[1.0, 0.99, 0.1], S_churn=1e9).t.max() == 1
    assert make("heun", schedules.make("flow"), grid=[1.0, 0.99, 0.1], S_churn=1e9).t.max() == 1
    assert make("heun", schedules.make("edm"), 3, S_churn=1e9).t.max() == pytest.approx(80 * np.sqrt(2))
    with pytest.raises(UserError, match="S_churn=-1"):
        make("heun", LINEAR, 5, S_churn=-1.0)


@pytest.mark.parametrize("options", CHURNS[1:])
def test_edm_euler_churn(options, monkeypatch):
    """The peer raises the state inside `step`, after the network has answered for the one before: algorithm 2's
    line 6 shows it the raised state. So here it is asked at the raised one; the noise is known in advance."""
    steps = 8
    peer = diffusers.EDMEulerScheduler()
    peer.set_timesteps(steps)
    table = make("euler", schedules.make("edm"), steps, **options)
    e = Evaluations(edm_denoise, table)
    lower = {k.replace("S_", "s_"): v for k, v in options.items()}
    x = torch.from_numpy(80 * X)
    for t, sigma in zip(peer.timesteps, peer.sigmas[:-1].numpy(), strict=True):
        gamma = min(options["S_churn"] / steps, 2**0.5 - 1) if options["S_tmin"] <= sigma <= options["S_tmax"] else 0
        raised = sigma * (1 + gamma)
        inject(monkeypatch, peer, [e.noise()])
        x_hat = x.numpy() + options["S_noise"] * np.sqrt(raised**2 - sigma**2) * e.noise()
        output = net(x_hat / np.sqrt(raised**2 + 0.25), 300 * np.log(raised))
        peer.is_scale_input_called, e.n = True, e.n + 1
        x = peer.step(torch.from_numpy(output), t, x, **lower).prev_sample
    np.testing.assert_allclose(ours(table, edm_jax, 80 * X), x.numpy(), **ROUNDING)


def test_euler_churn_of_a_discrete_model(monkeypatch):
    """As above: the peer is given what the network says of the raised state at the raised time."""
    steps, options = 8, {"S_churn": 2.0, "S_tmin": 0.05, "S_tmax": 50.0, "S_noise": 1.003}
    peer = scheduler(diffusers.EulerDiscreteScheduler, steps, timestep_spacing="trailing")
    grid = grids.make(LINEAR, steps, "trailing")
    table = make("euler", LINEAR, grid=grid, **options)
    noises = [None, *row_noises(table)]
    x = torch.from_numpy(X / grid.alpha[0])
    for n, (t, sigma) in enumerate(zip(peer.timesteps, peer.sigmas[:-1].numpy(), strict=True)):
        gamma = options["S_churn"] / steps if options["S_tmin"] <= sigma <= options["S_tmax"] else 0
        raised = sigma * (1 + gamma)
        shown, x_hat = float(LINEAR.inverse(-2 * np.log(raised))), x.numpy()
        if gamma:
            inject(monkeypatch, peer, [noises[n]])
            x_hat = x_hat + options["S_noise"] * np.sqrt(raised**2 - sigma**2) * noises[n]
        output = net(x_hat / np.sqrt(1 + raised**2), shown)
        peer.is_scale_input_called = True
        lower = {k.replace("S_", "s_"): v for k, v in options.items()}
        x = peer.step(torch.from_numpy(output), t, x, **lower).prev_sample
    np.testing.assert_allclose(ours(table, between), x.numpy(), **ROUNDING)


# ---- restarts ----


def algorithm_restart(e, x, t, intervals):
    """Xu et al. 2023, algorithm 1, line by line: Heun, and intervals (t_min, t_max, N, K) gone through K times more."""

    def heun(x, t):
        for a, b in itertools.pairwise(t):
            d = (x - e.denoise(x, a)) / a
            x_next = x + (b - a) * d
            if b != 0:
                x_next = x + (b - a) * (d + (x_next - e.denoise(x_next, b)) / b) / 2
            x = x_next
        return x

    at = {int(np.argmin(np.abs(np.array(t) - i[0]))): i for i in intervals}  # t_min brought to the nearest point
    for i in range(len(t) - 1):
        x = heun(x, t[i : i + 2])
        if i + 1 in at:
            _, t_max, N, K = at[i + 1]
            t_min = t[i + 1]
            way = (t_max ** (1 / 7) + np.arange(N) / (N - 1) * (t_min ** (1 / 7) - t_max ** (1 / 7))) ** 7
            for _ in range(K):
                x = x + np.sqrt(t_max**2 - t_min**2) * e.noise()
                x = heun(x, way)
    return x


@pytest.mark.parametrize(
    ("intervals", "evaluations"),
    [
        ([(0.14, 0.30, 3, 2)], 43),  # CIFAR-10's, with the paper's count
        ([(19.35, 40.79, 4, 1), (1.09, 1.92, 4, 1), (0.59, 1.09, 4, 5), (0.30, 0.59, 4, 5), (0.06, 0.30, 6, 6)], 167),
    ],
)
def test_restart_is_algorithm_1(intervals, evaluations):
    grid = grids.make(schedules.make("edm"), 18)
    table = make("restart", grid.schedule, grid=grid, intervals=intervals)
    assert len(table) == evaluations == 35 + sum(2 * (n - 1) * k for _, _, n, k in intervals)
    exact = algorithm_restart(Evaluations(edm_denoise, table), 80 * X, grid.sigma, intervals)
    np.testing.assert_allclose(ours(table, edm_jax, 80 * X), exact, **ROUNDING)


def test_restart_from_text_and_where_the_grid_has_no_point():
    edm = schedules.make("edm")
    a = make("restart", edm, 18, intervals="0.14:0.3:3:2,1:2:4:1")
    b = make("restart", edm, 18, intervals=[(0.14, 0.3, 3, 2), (1, 2, 4, 1)])
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
    few = make("restart", edm, 2, intervals=[(0.14, 0.3, 2, 1)], sigma_min=1.0)  # 80, 1, 0: the grid is given 0.14
    np.testing.assert_allclose(few.t, [80, 1, 1, 0.14, 0.3, 0.14, 0.14])


@pytest.mark.parametrize(
    ("intervals", "says"),
    [("0.1:0.2:3", "four numbers"), ("a:b", "0.14:0.3:3:2"), ([(0.3, 0.1, 3, 2)], "t_min < t_max"),
     ([(1, 500, 3, 2)], "157"), ([(0.1, 0.2, 1, 2)], "at least 2")],
)  # fmt: skip
def test_mistaken_intervals_are_one_line(intervals, says):
    with pytest.raises(UserError) as e:
        make("restart", LINEAR, 5, intervals=intervals)
    assert says in str(e.value) and "\n" not in str(e.value)


def test_dpmpp_2s_ancestral_is_the_papers_step():
    """k-diffusion's, written from Lu et al. 2022b, algorithm 1, between sigmas: one stochastic step and the last."""
    sigmas, eta = [5.0, 1.5, 0.0], 0.7
    table = make("dpmpp_2s_ancestral", schedules.make("edm"), grid=sigmas, grid_unit="sigma", eta=eta)
    x = 5 * X
    up = eta * np.sqrt(1.5**2 * (5.0**2 - 1.5**2) / 5.0**2)
    down = np.sqrt(1.5**2 - up**2)
    h = np.log(5.0) - np.log(down)
    middle = 5.0 * np.exp(-h / 2)
    u = middle / 5.0 * x - np.expm1(-h / 2) * edm_denoise(x, 5.0)
    x = down / 5.0 * x - np.expm1(-h) * edm_denoise(u, middle) + up * row_noises(table)[1]
    x = edm_denoise(x, 1.5)
    np.testing.assert_allclose(ours(table, edm_jax, 5 * X), x, **ROUNDING)
