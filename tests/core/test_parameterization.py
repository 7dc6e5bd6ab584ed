"""A prediction type is two numbers: every conversion follows from them."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jax_diffusion import schedules
from jax_diffusion.errors import UserError
from jax_diffusion.parameterization import PREDICTIONS, Parameterization

from .toys import NAMES, inner_times

EVERY = [(p, n) for p in PREDICTIONS for n in NAMES]


def setup(prediction, name, n=6):
    s = schedules.make(name)
    p = Parameterization(prediction, s)
    t = jnp.asarray(inner_times(s, n), jnp.float32)
    if isinstance(s, schedules.Discrete):
        t = jnp.floor(t) + 0.5 * (prediction == "flow")  # a derivative is that of a segment
    k0, k1 = jax.random.split(jax.random.key(0))
    x0, eps = jax.random.normal(k0, (n, 3, 2)), jax.random.normal(k1, (n, 3, 2))
    alpha, sigma = s.alpha_sigma(t)
    x_t = alpha[:, None, None] * x0 + sigma[:, None, None] * eps
    return p, t, x0, eps, x_t, alpha, sigma


@pytest.mark.parametrize(("prediction", "name"), EVERY)
def test_denoising_identity(prediction, name):
    """The right answer is understood: x_0 and eps come back from (target, x_t)."""
    p, t, x0, eps, x_t, alpha, sigma = setup(prediction, name)
    target = p.target(x0, eps, t)
    a, b = p.mix(t)
    d = a * sigma - b * alpha
    ulp = 2.0**-22  # float32, a few operations
    size_x0 = jnp.abs(sigma * a / d) + jnp.abs(sigma * b / d) + jnp.abs(b * alpha / d) + jnp.abs(b * sigma / d)
    size_eps = jnp.abs(a * alpha / d) + jnp.abs(a * sigma / d) + jnp.abs(alpha * a / d) + jnp.abs(alpha * b / d)
    # What cancels in eq. 2, times a rounding, times the largest |x_0|, |eps|: the conditioning of each row.
    worst = 4 * ulp * jnp.max(jnp.abs(jnp.stack([x0, eps])))
    for got, want, size in ((p.x0(target, x_t, t), x0, size_x0), (p.eps(target, x_t, t), eps, size_eps)):
        error = jnp.max(jnp.abs(got - want), axis=(1, 2))
        assert jnp.all(error <= worst * (1 + size)), (error, size)


@pytest.mark.parametrize(("prediction", "name"), EVERY)
def test_c_skip_and_c_out(prediction, name):
    """x0_hat = c_skip x_t + c_out pred (EDM's eq. 7), and so |x0 - x0_hat|^2 = c_out^2 |pred - target|^2."""
    p, t, x0, eps, x_t, *_ = setup(prediction, name)
    c_skip, c_out = p.c_skip(t)[:, None, None], p.c_out(t)[:, None, None]
    pred = jax.random.normal(jax.random.key(5), x_t.shape)
    size = jnp.abs(c_skip * x_t) + jnp.abs(c_out * pred)
    x0_hat = p.x0(pred, x_t, t)
    assert jnp.all(jnp.abs(x0_hat - (c_skip * x_t + c_out * pred)) <= 1e-6 * size)  # one sum in float32
    target = p.target(x0, eps, t)
    # Between two predictions, so that nothing cancels: both sides are the same product.
    gap = p.x0(pred, x_t, t) - p.x0(target, x_t, t)
    size = size + jnp.abs(c_out * target)
    assert jnp.all(jnp.abs(gap**2 - c_out**2 * (pred - target) ** 2) <= 1e-5 * size**2)


@pytest.mark.parametrize(("prediction", "name"), EVERY)
def test_mix_is_the_published_pair(prediction, name):
    p, t, _, _, _, alpha, sigma = setup(prediction, name)
    if prediction == "flow":
        h = 0.25 if isinstance(p.schedule, schedules.Discrete) else 1e-2 if name == "learned" else 1e-5
        t64 = np.asarray(t, np.float64)
        plus, minus = p.schedule.alpha_sigma(t64 + h), p.schedule.alpha_sigma(t64 - h)
        want = [(a - b) / (2 * h) for a, b in zip(plus, minus, strict=True)]
        rtol = 2e-2 if name == "learned" else 1e-3  # a finite difference; `learned` answers in float32
    else:
        s = sigma / alpha
        skip, out = 0.25 / (s**2 + 0.25), 0.5 * s / jnp.sqrt(s**2 + 0.25)
        want = {
            "x0": (1 + 0 * t, 0 * t),
            "epsilon": (0 * t, 1 + 0 * t),
            "v": (-sigma, alpha),
            "score": (0 * t, -1 / sigma),
            "edm": ((1 - skip) / out, -skip * s / out),
        }[prediction]
        rtol = 1e-5  # float32
    for got, w in zip(p.mix(t), want, strict=True):
        np.testing.assert_allclose(got, w, rtol=rtol, atol=rtol * float(np.max(np.abs(w))))


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_edm_is_table_1_of_karras(sigma_data):
    p = Parameterization("edm", schedules.make("edm"), sigma_data)
    s = jnp.geomspace(0.002, 80, 9)
    total = np.asarray(s, np.float64) ** 2 + sigma_data**2
    # float32; 1 - c_skip inside c_skip's solve costs a digit at small sigma.
    np.testing.assert_allclose(p.c_skip(s), sigma_data**2 / total, rtol=1e-4)
    np.testing.assert_allclose(p.c_out(s), s * sigma_data / np.sqrt(total), rtol=1e-4)
    np.testing.assert_allclose(p.c_in(s), 1 / np.sqrt(total), rtol=1e-5)
    np.testing.assert_allclose(p.c_noise(s), np.log(s) / 4, rtol=1e-5, atol=1e-6)
    # The target has unit variance for data of that deviation: Karras' first principle.
    a, b = p.mix(s)
    np.testing.assert_allclose((a * sigma_data) ** 2 + b**2, 1, rtol=1e-4)


def test_edm_numbers_are_those_of_diffusers():
    peer = diffusers.EDMEulerScheduler()
    p = Parameterization("edm", schedules.make("edm"))
    sigma = torch.logspace(-2, 1.5, 6)
    x, f = torch.randn(6, 1, generator=torch.Generator().manual_seed(0)), torch.ones(6, 1) * 0.7
    want = peer.precondition_outputs(x, f, sigma[:, None])
    got = p.x0(jnp.asarray(f.numpy()), jnp.asarray(x.numpy()), jnp.asarray(sigma.numpy()))
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-4, atol=1e-5)  # float32 on both sides
    want = peer.precondition_inputs(x, sigma[:, None]).numpy()
    np.testing.assert_allclose(p.c_in(jnp.asarray(sigma.numpy()))[:, None] * x.numpy(), want, rtol=1e-5)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_v_is_that_of_diffusers(name):
    peer = diffusers.DDPMScheduler(beta_schedule={"linear": "linear", "cosine": "squaredcos_cap_v2"}[name])
    p = Parameterization("v", schedules.make(name))
    t = np.array([0, 1, 250, 998, 999])
    x0, eps = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(np.float32)
    want = peer.get_velocity(torch.tensor(x0), torch.tensor(eps), torch.tensor(t)).numpy()
    got = p.target(jnp.asarray(x0), jnp.asarray(eps), jnp.asarray(t, jnp.float32))
    np.testing.assert_allclose(got, want, atol=3e-5)  # the peer's sigma_0 has a relative error of 5e-4


def test_c_noise():
    t = jnp.array([3.0, 500.0])
    for name in ("linear", "cosine"):
        for shift in (1.0, 2.0):
            p = Parameterization("epsilon", schedules.make(name, shift=shift))
            np.testing.assert_array_equal(p.c_noise(t), t)  # the timestep itself, exactly
    u = jnp.array([0.25, 0.5])
    np.testing.assert_array_equal(Parameterization("flow", schedules.make("flow")).c_noise(u), 1000 * u)
    ve = Parameterization("epsilon", schedules.make("ve"))
    np.testing.assert_allclose(ve.c_noise(u), np.log(ve.schedule.sigma(u)) / 4, rtol=1e-5, atol=1e-6)  # float32


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", ["edm", "ve"])
def test_inputs_have_unit_variance_where_the_schedule_explodes(name, prediction):
    s = schedules.make(name)
    p = Parameterization(prediction, s, sigma_data=0.4)
    t = jnp.asarray(inner_times(s), jnp.float32)
    np.testing.assert_allclose(p.c_in(t) ** 2 * (0.16 + s.sigma(t) ** 2), 1, rtol=1e-5)  # float32


def test_scalar_time_is_every_samples_time():
    p, t, x0, eps, *_ = setup("v", "vp")
    np.testing.assert_array_equal(p.target(x0, eps, t[2])[2], p.target(x0, eps, t)[2])


def test_unknown_prediction_names_the_nearest():
    with pytest.raises(UserError, match="epsilon"):
        Parameterization("epsilom", schedules.make("vp"))
