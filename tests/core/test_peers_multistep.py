"""Whole trajectories of the multistep and exponential solvers against diffusers' schedulers.

The peers keep their sigmas, and some their state, in float32; both are given float64 here, so that agreement is to
rounding. Where a peer is wrong the test says how, repairs it, and test_solvers.py measures that ours has its order.
"""

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_dpmsolver_multistep, scheduling_dpmsolver_singlestep

from jax_diffusion.solvers import grids, make

from .float64_peers import InFloat64
from .test_peers import BAR, INDICES, KEY, LINEAR, X, ours, torch_net
from .toys import draws

ROUNDING = {"rtol": 1e-10, "atol": 1e-10}  # float64 on both sides, over at most 25 steps; measured: 1e-12 of the state


@pytest.fixture(autouse=True)
def states_in_float64(monkeypatch):
    for module in (scheduling_dpmsolver_multistep, scheduling_dpmsolver_singlestep):
        monkeypatch.setattr(module, "torch", InFloat64(torch))


def on_grid(peer, grid):
    """The peer on our grid's evaluation times and exact sigmas, whatever spacing it would choose."""
    peer.set_timesteps(len(grid.t))
    peer.timesteps = torch.from_numpy(grid.t.astype(int))
    peer.sigmas = torch.from_numpy(grid.sigma / grid.alpha)
    return peer


def trajectory(peer, x=X, noises=None):
    x = torch.from_numpy(x)
    for i, t in enumerate(peer.timesteps):
        noise = {} if noises is None else {"variance_noise": torch.from_numpy(noises[i])}
        x = peer.step(torch_net(x, t), t, x, **noise).prev_sample
    assert x.dtype == torch.float64
    return x.numpy()


def trailing(steps, final="zero"):
    return grids.make(LINEAR, steps, "trailing", final=final)


# ---- PNDM ----


@pytest.mark.parametrize("final", ["zero", "min"])
@pytest.mark.parametrize("steps", [5, 10, 25])
@pytest.mark.parametrize(("solver", "skip"), [("plms", True), ("pndm", False)])
def test_pndm(solver, skip, steps, final):
    """On "leading" times, the only ones where the peer's t - T // N is the next time (trap 1).

    With an odd T // N the peer's Runge-Kutta evaluates the network half an integer away from the state it moved
    to; all of these are even.
    """
    peer = peer_of_pndm(skip, final)
    peer.set_timesteps(steps)
    grid = grids.make(LINEAR, steps, "leading", final=final)
    table = make(solver, LINEAR, steps, grid, lower_order_final=False)
    np.testing.assert_array_equal(table.t, peer.timesteps.numpy())  # which evaluations, also the repeated ones
    np.testing.assert_allclose(ours(table), trajectory(peer), **ROUNDING)


def peer_of_pndm(skip, final):
    peer = diffusers.PNDMScheduler(
        beta_schedule="linear", skip_prk_steps=skip, timestep_spacing="leading", set_alpha_to_one=final == "zero"
    )
    peer.alphas_cumprod = torch.from_numpy(BAR)
    peer.final_alpha_cumprod = torch.tensor(1.0 if final == "zero" else BAR[0], dtype=torch.float64)
    return peer


# ---- LMS ----


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("steps", [1, 5, 25])
def test_lms(steps, order):
    """The peer's state is x / alpha (EDM's frame), and it keeps its order on the step that lands on sigma = 0."""
    grid = trailing(steps)
    peer = on_grid(diffusers.LMSDiscreteScheduler(beta_schedule="linear"), grid)
    peer.timesteps = peer.timesteps.double()
    x = torch.from_numpy(X / grid.alpha[0])
    for t in peer.timesteps:
        x = peer.step(torch_net(peer.scale_model_input(x, t), t), t, x, order=order).prev_sample
    table = make("lms", LINEAR, steps, grid, order=order, lower_order_final=False)
    np.testing.assert_allclose(ours(table), x.numpy(), **ROUNDING)


# ---- DEIS ----


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(("steps", "lower_order_final"), [(5, True), (5, False), (25, True)])
def test_deis(steps, lower_order_final, order):
    """final="min": the peer never lands on sigma = 0, where its formula takes the logarithm of 0."""
    grid = trailing(steps, "min")
    peer = diffusers.DEISMultistepScheduler(
        beta_schedule="linear", solver_order=order, lower_order_final=lower_order_final
    )
    expected = trajectory(on_grid(peer, grid))
    table = make("deis", LINEAR, steps, grid, order=order, lower_order_final=lower_order_final)
    np.testing.assert_allclose(ours(table), expected, **ROUNDING)


# ---- DPM-Solver and DPM-Solver++, multistep ----


def multistep_peer(algorithm, order, grid, **options):
    peer = diffusers.DPMSolverMultistepScheduler(
        beta_schedule="linear",
        algorithm_type=algorithm,
        solver_order=order,
        final_sigmas_type="zero" if grid.sigma[-1] == 0 else "sigma_min",
        **options,
    )
    return on_grid(peer, grid)


@pytest.mark.parametrize(("steps", "lower_order_final"), [(5, True), (5, False), (25, True)])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize(
    ("solver", "algorithm", "final"),
    [
        ("dpmpp_2m", "dpmsolver++", "zero"),
        ("dpmpp_2m", "dpmsolver++", "min"),
        ("dpm_solver_2m", "dpmsolver", "min"),  # the peer refuses sigma = 0 here
    ],
)
def test_second_order_multistep(solver, algorithm, final, solver_type, steps, lower_order_final):
    grid = trailing(steps, final)
    peer = multistep_peer(algorithm, 2, grid, solver_type=solver_type, lower_order_final=lower_order_final)
    table = make(solver, LINEAR, steps, grid, solver_type=solver_type, lower_order_final=lower_order_final)
    np.testing.assert_allclose(ours(table), trajectory(peer), **ROUNDING)


@pytest.mark.parametrize(("steps", "lower_order_final"), [(2, True), (5, True), (5, False), (25, True)])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize(
    ("solver", "algorithm", "final"),
    [("dpmpp_3m", "dpmsolver++", "zero"), ("dpmpp_3m", "dpmsolver++", "min"), ("dpm_solver_3m", "dpmsolver", "min")],
)
def test_third_order_multistep(solver, algorithm, final, solver_type, steps, lower_order_final):
    """The peer weights the second divided difference, h^2 D'' / 2, as if it were h^2 D''; so does half_curvature.

    That its weight is wrong and ours right: its DEIS of order 3 is the same integral of the same parabola, and
    agrees with ours (test_deis, and below); and the order is measured in test_solvers.py.
    """
    grid = trailing(steps, final)
    peer = multistep_peer(algorithm, 3, grid, lower_order_final=lower_order_final, solver_type=solver_type)
    options = {"lower_order_final": lower_order_final, "solver_type": solver_type, "half_curvature": True}
    np.testing.assert_allclose(ours(make(solver, LINEAR, steps, grid, **options)), trajectory(peer), **ROUNDING)


@pytest.mark.parametrize("order", [2, 3])
def test_the_peers_deis_is_our_multistep_dpm_solver(order):
    grid = trailing(25, "min")
    expected = trajectory(on_grid(diffusers.DEISMultistepScheduler(beta_schedule="linear", solver_order=order), grid))
    table = make(f"dpm_solver_{order}m", LINEAR, 25, grid, **({"solver_type": "heun"} if order == 2 else {}))
    np.testing.assert_allclose(ours(table), expected, **ROUNDING)


# ---- SDE-DPM-Solver++ ----


@pytest.mark.parametrize("final", ["zero", "min"])
@pytest.mark.parametrize(("steps", "lower_order_final"), [(5, True), (5, False), (25, True)])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
def test_sde_dpmpp_2m(solver_type, steps, lower_order_final, final):
    grid = trailing(steps, final)
    noises = np.asarray(draws(KEY, INDICES, steps, (4,)), np.float64)
    peer = multistep_peer("sde-dpmsolver++", 2, grid, solver_type=solver_type, lower_order_final=lower_order_final)
    table = make("sde_dpmpp_2m", LINEAR, steps, grid, solver_type=solver_type, lower_order_final=lower_order_final)
    np.testing.assert_allclose(ours(table), trajectory(peer, noises=noises), **ROUNDING)


@pytest.mark.parametrize("final", ["zero", "min"])
@pytest.mark.parametrize("steps", [5, 25])
def test_sde_dpmpp_3m(steps, final):
    """The peer subtracts 1/2 where the integral adds it: its weight of the second difference D2 is

        (1 - e^-2h - 2h) / (2h)^2 - 1/2, which tends to -1 with h, and not + 1/2, which tends to 0

    (k-diffusion's sample_dpmpp_3m_sde has the right sign). Repaired here by adding alpha D2. Both have half of it
    otherwise, as in test_third_order_multistep.
    """
    grid = trailing(steps, final)
    noises = np.asarray(draws(KEY, INDICES, steps, (4,)), np.float64)
    peer = multistep_peer("sde-dpmsolver++", 3, grid)
    theirs = peer.multistep_dpm_solver_third_order_update

    def repaired(outputs, *, sample, noise):
        i, (m2, m1, m0) = peer.step_index, outputs
        l = grid.half_log_snr
        slopes = [(m0 - m1) / (l[i] - l[i - 1]), (m1 - m2) / (l[i - 1] - l[i - 2])]
        D2 = (slopes[0] - slopes[1]) / (l[i] - l[i - 2]) * (l[i + 1] - l[i]) ** 2
        return theirs(outputs, sample=sample, noise=noise) + grid.alpha[i + 1] * D2

    peer.multistep_dpm_solver_third_order_update = repaired
    table = make("sde_dpmpp_3m", LINEAR, steps, grid, solver_type="midpoint", half_curvature=True)
    np.testing.assert_allclose(ours(table), trajectory(peer, noises=noises), **ROUNDING)


# ---- DPM-Solver and DPM-Solver++, singlestep ----


@pytest.mark.parametrize(
    ("solver", "order", "algorithm", "solver_type", "final", "steps"),
    [
        ("dpm_solver_1", 1, "dpmsolver", "midpoint", "min", 10),
        ("dpmpp_2s", 2, "dpmsolver++", "midpoint", "zero", 10),
        ("dpmpp_2s", 2, "dpmsolver++", "midpoint", "zero", 25),
        ("dpmpp_2s", 2, "dpmsolver++", "heun", "zero", 10),
        ("dpm_solver_2", 2, "dpmsolver", "midpoint", "min", 10),
        ("dpm_solver_2", 2, "dpmsolver", "heun", "min", 10),
        ("dpmpp_3s", 3, "dpmsolver++", "heun", "zero", 9),
        ("dpmpp_3s", 3, "dpmsolver++", "heun", "zero", 10),
        ("dpmpp_3s", 3, "dpmsolver++", "heun", "zero", 11),
        ("dpm_solver_3", 3, "dpmsolver", "heun", "min", 9),
    ],
)
def test_singlestep(solver, order, algorithm, solver_type, final, steps):
    """With stages at the grid's own points, which is how the peer has them.

    Not compared: the peer's third order with "midpoint", whose second stage takes 1/2 I_0 where the paper's algorithm
    2 (and its own "heun") has I_1. Its last step, of lower order with lower_order_final, is ours where it lands on
    sigma = 0; elsewhere it is compared without.
    """
    grid = trailing(steps, final)
    peer = diffusers.DPMSolverSinglestepScheduler(
        beta_schedule="linear",
        algorithm_type=algorithm,
        solver_order=order,
        solver_type=solver_type,
        final_sigmas_type="zero" if final == "zero" else "sigma_min",
        lower_order_final=final == "zero",
    )
    options = {} if order == 1 else {"solver_type": solver_type, "share_steps": True}
    table = make(solver, LINEAR, steps, grid, **options)
    assert len(table) == steps
    np.testing.assert_allclose(ours(table), trajectory(on_grid(peer, grid)), **ROUNDING)


# ---- UniPC ----


@pytest.mark.parametrize("corrector", [True, False])
@pytest.mark.parametrize("predict_x0", [True, False])
@pytest.mark.parametrize("solver_type", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc(order, solver_type, predict_x0, corrector):
    for steps, final, lower_order_final in [
        (5, "zero", True),
        (5, "min", True),
        (10, "min", False),
        (25, "zero", True),
    ]:
        grid = trailing(steps, final)
        peer = diffusers.UniPCMultistepScheduler(
            beta_schedule="linear",
            solver_order=order,
            solver_type=solver_type,
            predict_x0=predict_x0,
            disable_corrector=[] if corrector else list(range(steps)),
            lower_order_final=lower_order_final,
            final_sigmas_type="zero" if final == "zero" else "sigma_min",
        )
        options = {"solver_type": solver_type, "predict_x0": predict_x0, "corrector": corrector}
        if final == "zero" and (solver_type == "bh1" or not predict_x0):
            # Landing on sigma = 0, where h is infinite, the peer multiplies 0 with sigma (e^h - 1) or with B(h) = h.
            assert np.isnan(trajectory(on_grid(peer, grid))).all()
            continue
        table = make("unipc", LINEAR, steps, grid, order=order, lower_order_final=lower_order_final, **options)
        np.testing.assert_allclose(ours(table), trajectory(on_grid(peer, grid)), **ROUNDING)
