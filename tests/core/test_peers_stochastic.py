"""Ancestral steps, the midpoint, Heun, zero terminal SNR and clipping: whole trajectories against diffusers.

What a peer does differently from its source is shown where it matters. Churn and restarts: test_churn.py.
"""

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jax_diffusion import guidance, schedules
from jax_diffusion.solvers import grids, make

from .float64_peers import ROUNDING, between, inject, peers_in_float64, row_noises, run, scheduler  # noqa: F401
from .test_peers import INDICES, KEY, LINEAR, X, flow_denoise, net, ours, torch_net
from .toys import draws

pytestmark = pytest.mark.usefixtures("peers_in_float64")


# ---- deterministic second order: karras grids, the midpoint ----

SECOND_ORDER = {"heun": diffusers.HeunDiscreteScheduler, "dpm2": diffusers.KDPM2DiscreteScheduler}


@pytest.mark.parametrize("steps", [2, 10])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("solver", sorted(SECOND_ORDER))
def test_heun_and_dpm2(solver, spacing, steps):
    peer = scheduler(SECOND_ORDER[solver], steps, timestep_spacing=spacing)
    grid = grids.make(LINEAR, steps, spacing)
    table = make(solver, LINEAR, grid=grid)
    np.testing.assert_allclose(table.t, peer.timesteps.numpy(), rtol=1e-9)  # the midpoint's too
    np.testing.assert_allclose(ours(table, between), run(peer, X / grid.alpha[0]), **ROUNDING)


@pytest.mark.parametrize("spacing", ["karras", "exponential"])
@pytest.mark.parametrize("steps", [2, 10])
@pytest.mark.parametrize("cls", [diffusers.EulerDiscreteScheduler, diffusers.HeunDiscreteScheduler])
def test_grids_of_noise_on_a_discrete_model(cls, steps, spacing):
    """The same sigmas, and the same times between the integers: lambda linear there is log sigma linear."""
    peer = scheduler(cls, steps, **{f"use_{spacing}_sigmas": True}, timestep_spacing="linspace")
    grid = grids.make(LINEAR, steps, spacing)
    solver = "heun" if cls is diffusers.HeunDiscreteScheduler else "euler"
    table = make(solver, LINEAR, grid=grid)
    np.testing.assert_allclose(table.t, peer.timesteps.numpy(), rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(ours(table, between), run(peer, X / grid.alpha[0]), **ROUNDING)


@pytest.mark.parametrize("solver", ["dpm2", "dpm2_ancestral"])
def test_karras_times_of_dpm2_are_not_rounded(solver, monkeypatch):
    """The peers show the network round(t) with the sigma of t (on exact Gaussians that costs nothing to speak of: the
    errors of the roundings cancel); midpoints, and the times of Euler and Heun, they leave as they are."""
    peer = scheduler(SECOND_ORDER.get(solver) or ANCESTRAL[solver], 10, use_karras_sigmas=True)
    grid = grids.make(LINEAR, 10, "karras")
    table = make(solver, LINEAR, grid=grid)
    np.testing.assert_array_equal(peer.timesteps.numpy()[2::2], np.round(grid.t[1:]))
    peer.timesteps = torch.from_numpy(table.t)
    peer.set_begin_index(0)
    noises = row_noises(table)
    if "ancestral" in solver:
        inject(monkeypatch, peer, [*noises[1::2], noises[0]])
    np.testing.assert_allclose(ours(table, between), run(peer, X / grid.alpha[0]), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("steps", [1, 2, 10])
def test_flow_heun(steps):
    peer = diffusers.FlowMatchHeunDiscreteScheduler()
    peer.set_timesteps(steps)
    x = torch.from_numpy(X)
    for t in peer.timesteps:
        x = peer.step(torch_net(x, t), t, x).prev_sample
    # The peer's points go from 1 to 1 / 1000, and from there to 0.
    table = make("heun", schedules.make("flow"), grid=np.linspace(1, 1e-3, steps))
    np.testing.assert_allclose(ours(table, flow_denoise(1.0)), x.numpy(), **ROUNDING)


def test_the_flow_heun_of_diffusers_shifts_twice():
    """Its sigma_min and sigma_max are shifted already when set_timesteps shifts what lies between them."""
    peer = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)
    peer.set_timesteps(5)
    once = np.linspace(1, 3 * 1e-3 / (1 + 2 * 1e-3), 5)  # linear between ends shifted by eq. 23 of Esser et al. 2024
    np.testing.assert_allclose(peer.sigmas[::2], [*(3 * once / (1 + 2 * once)), 0][: len(peer.sigmas[::2])], rtol=1e-6)


# ---- ancestral ----

ANCESTRAL = {
    "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "dpm2_ancestral": diffusers.KDPM2AncestralDiscreteScheduler,
}


@pytest.mark.parametrize("steps", [1, 2, 10])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("solver", sorted(ANCESTRAL))
def test_ancestral(solver, spacing, steps, monkeypatch):
    if steps == 1 and spacing == "linspace":
        spacing = "trailing"  # the peer's one point is t = 0 then
    peer = scheduler(ANCESTRAL[solver], steps, timestep_spacing=spacing)
    grid = grids.make(LINEAR, steps, spacing)
    table = make(solver, LINEAR, grid=grid)
    np.testing.assert_allclose(table.t, peer.timesteps.numpy(), rtol=1e-7, atol=1e-6)
    noises = row_noises(table)
    # The peer draws at the end of every step, also of those of two evaluations and of the last, where it weighs 0.
    ends = list(range(1, len(table), 2)) if solver == "dpm2_ancestral" else list(range(len(table)))
    inject(monkeypatch, peer, [*noises[ends], noises[0]])
    # Where eta = 1 the middle is the next point itself, found through a logarithm: 1e-8 in t.
    np.testing.assert_allclose(ours(table, between), run(peer, X / grid.alpha[0]), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", ["linear", "vp", "edm", "flow"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_euler_ancestral_is_ddim_with_that_eta(name, eta):
    """Said for every schedule at once: sigma_up of the ratio is DDIM's sigma over alpha."""
    schedule = schedules.make(name)
    a, b = make("euler_ancestral", schedule, 12, eta=eta), make("ddim", schedule, 12, eta=eta)
    for column in ("A", "B", "C"):
        np.testing.assert_allclose(getattr(a, column), getattr(b, column), rtol=1e-7, atol=1e-9)  # cancellation


# ---- zero terminal SNR, v prediction, clipping ----


@pytest.mark.parametrize("use_clipped_model_output", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
def test_ddim_clipped(prediction, eta, use_clipped_model_output):
    """Also from pure noise (zero terminal SNR) where the prediction allows it (Lin et al. 2023)."""
    zero = prediction == "v_prediction"
    schedule = schedules.make("linear", zero_terminal_snr=zero)
    bar = schedule.alpha_bar
    peer = diffusers.DDIMScheduler(
        beta_schedule="linear",
        clip_sample=True,
        clip_sample_range=0.4,
        rescale_betas_zero_snr=zero,
        prediction_type=prediction,
        timestep_spacing="trailing",
    )
    peer.alphas_cumprod = torch.from_numpy(bar)
    peer.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    steps = 10
    peer.set_timesteps(steps)
    noises = np.asarray(draws(KEY, INDICES, steps, (4,)), np.float64)
    x, clipped = torch.from_numpy(X), 0
    for t, xi in zip(peer.timesteps, noises, strict=True):
        out = peer.step(
            torch_net(x, t), int(t), x, eta=eta, use_clipped_model_output=use_clipped_model_output,
            variance_noise=torch.from_numpy(xi),
        )  # fmt: skip
        x, clipped = out.prev_sample, clipped + int((out.pred_original_sample.abs() == 0.4).sum())
    assert clipped > 5  # else this would test nothing

    def denoise(x, t):
        b = jnp.asarray(bar, x.dtype)[jnp.round(t).astype(int)]
        out = net(x, t, jnp)
        return jnp.sqrt(b) * x - jnp.sqrt(1 - b) * out if zero else (x - jnp.sqrt(1 - b) * out) / jnp.sqrt(b)

    grid = grids.make(schedule, steps, "trailing")
    table = make("ddim", schedule, grid=grid, eta=eta, use_clipped_model_output=use_clipped_model_output)
    np.testing.assert_allclose(ours(table, guidance.clip(denoise, 0.4)), x.numpy(), **ROUNDING)


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "euler", "dpmpp_2m", "heun", "dpm2", "euler_ancestral"])
def test_zero_terminal_snr_begins_as_a_flow_does(solver):
    """From alpha = 0 the first step knows nothing but D: x_1 = alpha_1 D + what the solver keeps of the noise."""
    schedule = schedules.make("linear", zero_terminal_snr=True)
    grid = grids.make(schedule, 10)
    assert (grid.alpha[0], grid.sigma[0], grid.half_log_snr[0]) == (0, 1, -np.inf)
    table = make(solver, schedule, grid=grid)
    assert table.t[0] == 999 and table.scale == 1
    x0, eps = 0.7, -1.1
    x, history = eps, [0.0] * table.memory  # the path of a right denoiser
    if not np.any(table.C):
        for n in range(len(table)):
            history = [x0, *history][: table.memory]
            x = table.A[n] * x + table.B[n] @ history
        assert x == pytest.approx(x0, abs=1e-10)  # float64
