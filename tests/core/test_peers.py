"""Whole trajectories against diffusers' schedulers, with one toy network for both."""

import functools

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_ddpm

from jax_diffusion import schedules
from jax_diffusion.solvers import grids, make, sample
from jax_diffusion.solvers.ddim import ddim
from jax_diffusion.solvers.ddpm import ddpm
from jax_diffusion.solvers.dpmpp import dpmpp_2m
from jax_diffusion.solvers.euler import euler
from jax_diffusion.solvers.heun import heun

from .toys import draws

LINEAR = schedules.make("linear")
BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
KEY, INDICES = jax.random.key(4), jnp.arange(3)
X = np.random.default_rng(0).normal(size=(3, 4))


def net(x, t, np=np):
    """A smooth nonlinear stand-in for the epsilon network, of NumPy, JAX or torch arrays."""
    return np.tanh(0.8 * x) + 0.3 * np.sin(2 * x + t / 300) - 0.1


def torch_net(x, t):
    return net(x, torch.as_tensor(t, dtype=x.dtype), torch)


def denoise(x, t):
    """x0_hat of that network on the discrete linear schedule; exact at the integers."""
    bar = jnp.asarray(BAR, x.dtype)[jnp.round(t).astype(int)]
    return (x - jnp.sqrt(1 - bar) * net(x, t, jnp)) / jnp.sqrt(bar)


@functools.partial(jax.jit, static_argnums=0)  # one program for all tables of as many rows
def program(denoise, table, x):
    return sample(KEY, denoise, table, (4,), x=x, indices=INDICES)


def ours(table, denoise=denoise, x=X):
    with jax.enable_x64(True):
        return np.asarray(program(denoise, table, jnp.asarray(x, jnp.float64)))


def peer_of(cls, **options):
    peer = cls(beta_schedule="linear", clip_sample=False, **options)
    peer.alphas_cumprod = torch.from_numpy(BAR)  # its arithmetic on a float64 table: agreement to 1e-9
    if hasattr(peer, "one"):
        peer.one = peer.one.double()
    if hasattr(peer, "final_alpha_cumprod"):
        one = peer.config.set_alpha_to_one
        peer.final_alpha_cumprod = torch.tensor(1.0 if one else BAR[0], dtype=torch.float64)
    return peer


@pytest.mark.parametrize("steps", [1, 10, 50, 300, 999])
@pytest.mark.parametrize(("spacing", "offset"), [("leading", 0), ("leading", 1), ("trailing", 0), ("linspace", 0)])
def test_timesteps(spacing, offset, steps):
    """Also where the steps do not divide T (300)."""
    peer = diffusers.DDIMScheduler(timestep_spacing=spacing, steps_offset=offset)
    peer.set_timesteps(steps)
    np.testing.assert_array_equal(grids.times(LINEAR, steps, spacing, offset=offset), peer.timesteps.numpy())


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize(
    ("spacing", "offset", "final"),
    [("leading", 0, "zero"), ("leading", 1, "zero"), ("leading", 0, "min"), ("trailing", 0, "zero")],
)
def test_ddim(spacing, offset, final, steps, eta):
    """Spacings whose stride is the peer's T // n, which is all its previous timestep is right for (trap 1)."""
    peer = peer_of(
        diffusers.DDIMScheduler, timestep_spacing=spacing, steps_offset=offset, set_alpha_to_one=final == "zero"
    )
    peer.set_timesteps(steps)
    noises = np.asarray(draws(KEY, INDICES, steps, (4,)), np.float64)
    x = torch.from_numpy(X)
    for t, xi in zip(peer.timesteps, noises, strict=True):
        x = peer.step(torch_net(x, t), int(t), x, eta=eta, variance_noise=torch.from_numpy(xi)).prev_sample
    table = ddim(grids.make(LINEAR, steps, spacing, offset=offset, final=final), eta)
    # float64 on both sides; errors grow by at most the network's slope over 50 steps.
    np.testing.assert_allclose(ours(table), x.numpy(), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("times", [list(range(6, -1, -1)), [999, 700, 650, 200, 31, 2, 0]])
def test_ddpm(times, variance, monkeypatch):
    """Explicit timesteps, adjacent and not. They end at 0: only there does the peer add no noise (trap 2)."""
    peer = peer_of(diffusers.DDPMScheduler, variance_type=variance)
    peer.set_timesteps(timesteps=times)
    noises = iter(np.asarray(draws(KEY, INDICES, len(times), (4,)), np.float64))
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *a, **k: torch.from_numpy(next(noises)))
    x = torch.from_numpy(X)
    for t in times:
        x = peer.step(torch_net(x, t), t, x).prev_sample
    table = ddpm(grids.from_times(LINEAR, np.array(times, float)), variance)
    np.testing.assert_allclose(ours(table), x.numpy(), rtol=1e-7, atol=1e-8)  # float64 on both sides


def sigmas_to_float64(peer, times):
    peer.sigmas = torch.from_numpy(np.append(np.sqrt((1 - BAR) / BAR)[np.array(times, int)], 0.0))


@pytest.mark.parametrize("lower_order_final", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 14, 15])
def test_dpmpp_2m(steps, lower_order_final):
    """Both sides of the fifteen steps at which lower_order_final stops to matter."""
    times = grids.times(LINEAR, steps, "trailing")
    peer = diffusers.DPMSolverMultistepScheduler(
        beta_schedule="linear", lower_order_final=lower_order_final, final_sigmas_type="zero"
    )
    peer.set_timesteps(timesteps=times.astype(int).tolist())
    sigmas_to_float64(peer, times)
    x = torch.from_numpy(X)
    for t in peer.timesteps:
        x = peer.step(torch_net(x, t), t, x).prev_sample
    got = ours(dpmpp_2m(grids.from_times(LINEAR, times), lower_order_final))
    np.testing.assert_allclose(got, x.numpy(), rtol=1e-6, atol=1e-6)  # the peer keeps its state in float32


@pytest.mark.parametrize("lower_order_final", [True, False])
@pytest.mark.parametrize("steps", [2, 15])
def test_dpmpp_2m_landing_on_a_finite_noise(steps, lower_order_final):
    """final="min": here the last step can be of second order, and with few steps is so only if asked."""
    times = grids.times(LINEAR, steps, "trailing")
    peer = diffusers.DPMSolverMultistepScheduler(
        beta_schedule="linear", lower_order_final=lower_order_final, final_sigmas_type="sigma_min"
    )
    peer.set_timesteps(timesteps=times.astype(int).tolist())
    sigmas_to_float64(peer, times)
    peer.sigmas[-1] = ((1 - BAR[0]) / BAR[0]) ** 0.5
    x = torch.from_numpy(X)
    for t in peer.timesteps:
        x = peer.step(torch_net(x, t), t, x).prev_sample
    got = ours(dpmpp_2m(grids.from_times(LINEAR, times, "min"), lower_order_final))
    np.testing.assert_allclose(got, x.numpy(), rtol=1e-6, atol=1e-6)  # the peer keeps its state in float32


@pytest.mark.parametrize("steps", [1, 2, 10])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize(
    ("cls", "solver"), [(diffusers.EulerDiscreteScheduler, euler), (diffusers.HeunDiscreteScheduler, heun)]
)
def test_euler_and_heun(cls, solver, spacing, steps):
    """The peers' state is x / alpha (EDM's frame); ours is x on every schedule."""
    peer = cls(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, timestep_spacing=spacing)
    peer.set_timesteps(steps)
    grid = grids.make(LINEAR, steps, spacing)
    x = torch.from_numpy(X / grid.alpha[0]).float()
    for t in peer.timesteps:
        x = peer.step(torch_net(peer.scale_model_input(x, t), t), t, x).prev_sample
    # The peer is float32 throughout, with states up to 160 (1 / alpha_T): its rounding of them, carried down.
    np.testing.assert_allclose(ours(solver(grid)), x.numpy(), rtol=1e-4, atol=3e-4)


@functools.cache  # one function a shift, hence one program a length
def flow_denoise(shift):
    def denoise(x, t):
        s = shift * t / (1 + (shift - 1) * t)  # Esser et al. 2024, eq. 23
        return x - s * net(x, 1000 * s, jnp)

    return denoise


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 10])
@pytest.mark.parametrize("solver", ["euler", "ddim"])
def test_flow_euler(solver, steps, shift):
    peer = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    peer.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    x = torch.from_numpy(X).float()
    for t in peer.timesteps:
        x = peer.step(torch_net(x, t), t, x).prev_sample

    table = make(solver, schedules.make("flow", shift=shift), steps, "uniform")
    np.testing.assert_allclose(ours(table, flow_denoise(shift)), x.numpy(), rtol=1e-5, atol=1e-5)  # float32 of the peer


@pytest.mark.parametrize("steps", [1, 10])
def test_edm_euler(steps):
    peer = diffusers.EDMEulerScheduler()
    peer.set_timesteps(steps)
    grid = grids.make(schedules.make("edm"), steps)
    x = torch.from_numpy(80 * X).float()
    for t, s in zip(peer.timesteps, peer.sigmas[:-1], strict=True):
        x = peer.step(torch_net(peer.scale_model_input(x, t), 300 * s.log()), t, x).prev_sample

    def edm_denoise(x, s):
        total = s * s + 0.25
        f = net(x / jnp.sqrt(total), 300 * jnp.log(s), jnp)
        return 0.25 / total * x + 0.5 * s / jnp.sqrt(total) * f  # Karras et al. 2022, table 1

    # float32 of the peer, on states of 200.
    np.testing.assert_allclose(ours(euler(grid), edm_denoise, 80 * X), x.numpy(), rtol=1e-4, atol=3e-4)
