"""Time grids: the published formulas one number at a time, diffusers' tables, and what a user may get wrong."""

import diffusers
import numpy as np
import pytest
from diffusers.schedulers.scheduling_utils import AysSchedules
from scipy import stats

from jax_diffusion import schedules
from jax_diffusion.errors import UserError
from jax_diffusion.schedules import EDM, VE, Discrete, betas
from jax_diffusion.solvers import grids, make

LINEAR = schedules.make("linear")
SD = Discrete(betas("scaled_linear", 1000, 0.00085, 0.012))
CONTINUOUS = ["vp", "subvp", "ve", "edm", "flow", "cosine_continuous", "linear_log_snr"]
DISCRETE = sorted(schedules.BETAS)


def noise_of(grid):
    """sigma / alpha at the evaluation points."""
    return (grid.sigma / grid.alpha)[:-1]


@pytest.mark.parametrize("steps", [1, 2, 10, 50])
@pytest.mark.parametrize("spacing", [*grids.OF_TIME, *grids.OF_NOISE])
@pytest.mark.parametrize("name", [*CONTINUOUS, *DISCRETE])
def test_every_spacing_descends_inside_the_schedule_and_lands(name, spacing, steps):
    s = schedules.make(name)
    grid = grids.make(s, steps, spacing)
    assert grid.t.shape == (steps,) and np.all(np.diff(grid.t) < 0)
    assert s.t_min <= grid.t[-1] and grid.t[0] <= s.t_max
    assert np.all(np.diff(grid.sigma) < 0) and (grid.alpha[-1], grid.sigma[-1]) == (1, 0)
    if spacing in grids.OF_TIME:
        assert grid.t[0] == s.t_max
    if s.scaling != "flow":
        least = grids.make(s, steps, spacing, final="min")
        assert (least.alpha[-1], least.sigma[-1]) == s.alpha_sigma(np.float64(s.t_min))


@pytest.mark.parametrize("name", ["vp", "flow", "linear", "edm"])
def test_spacings_in_time_by_their_formulas(name):
    s, n = schedules.make(name), 7
    span = s.t_max - s.t_min
    for i, t in zip(range(n, 0, -1), grids.make(s, n, "quadratic").t, strict=True):
        assert t == pytest.approx(s.t_min + span * (i / n) ** 2)
    for i, t in zip(range(n, 0, -1), grids.make(s, n, "uniform").t, strict=True):
        assert t == pytest.approx(s.t_min + span * i / n)
    for i, t in zip(range(n, 0, -1), grids.make(s, n, "beta").t, strict=True):
        # The quantile: the Beta distribution's mass below it is i/n.
        assert stats.beta.cdf((t - s.t_min) / span, 0.6, 0.6) == pytest.approx(i / n, abs=1e-9)
    uniform = grids.make(s, n, "beta", beta_alpha=1.0, beta_beta=1.0)
    np.testing.assert_allclose(uniform.t, grids.make(s, n, "uniform").t, rtol=1e-12)


@pytest.mark.parametrize("name", ["vp", "linear", "scaled_linear", "cosine", "edm", "ve"])
@pytest.mark.parametrize("n", [2, 10])
def test_spacings_in_noise_by_their_formulas(name, n):
    s = schedules.make(name)
    most, least = (np.exp(-s.log_snr(np.float64(t)) / 2) for t in (s.t_max, s.t_min))
    most, least = min(most, np.exp(10)), max(least, np.exp(-10))
    i = np.arange(n)
    karras = (most ** (1 / 7) + i / (n - 1) * (least ** (1 / 7) - most ** (1 / 7))) ** 7
    # float64 through log, interpolation and exp.
    np.testing.assert_allclose(noise_of(grids.make(s, n, "karras")), karras, rtol=1e-9)
    exponential = most * (least / most) ** (i / (n - 1))
    np.testing.assert_allclose(noise_of(grids.make(s, n, "exponential")), exponential, rtol=1e-9)
    np.testing.assert_array_equal(grids.make(s, n, "exponential").t, grids.make(s, n, "log_snr").t)
    np.testing.assert_allclose(np.diff(grids.make(s, n, "log_snr").log_snr[:-1], 2), 0, atol=1e-8)


@pytest.mark.parametrize("spacing", ["karras", "exponential"])
@pytest.mark.parametrize(("peer_spacing", "ends"), [("linspace", None), ("leading", (0, 900)), ("trailing", (99, 999))])
def test_noise_spacings_of_diffusers(spacing, peer_spacing, ends):
    """It takes the range from its timestep_spacing; sigma_min and sigma_max say the same here."""
    peer = diffusers.EulerDiscreteScheduler(
        beta_schedule="linear", timestep_spacing=peer_spacing, **{f"use_{spacing}_sigmas": True}
    )
    peer.set_timesteps(10)
    options = {}
    if ends:
        options = {
            k: float(np.exp(-LINEAR.log_snr(t) / 2)) for k, t in zip(("sigma_min", "sigma_max"), ends, strict=True)
        }
    ours = grids.make(LINEAR, 10, spacing, **options)
    # The peer's alphas_cumprod is float32: 1 - alpha_bar_0 = 1e-4 keeps three and a half digits.
    np.testing.assert_allclose(noise_of(ours), peer.sigmas[:-1].numpy(), rtol=5e-4)
    np.testing.assert_allclose(ours.t, peer.timesteps.numpy(), atol=0.01)


def test_edm_exponential_of_diffusers():
    peer = diffusers.EDMEulerScheduler(sigma_schedule="exponential")
    peer.set_timesteps(9)
    np.testing.assert_allclose(grids.make(EDM(), 9, "exponential").sigma, peer.sigmas.numpy(), rtol=2e-6)  # float32


def test_the_beta_sigmas_of_diffusers_are_another_grid():
    """The paper draws times from the Beta distribution; diffusers lays its quantiles on sigma, which leaves most
    points among the noisiest. Ours has as many in the first as in the last quarter of time."""
    peer = diffusers.EulerDiscreteScheduler(beta_schedule="linear", use_beta_sigmas=True)
    peer.set_timesteps(40)
    t = grids.make(LINEAR, 40, "beta").t
    theirs = peer.timesteps.numpy()
    assert abs(np.sum(t < 250) - np.sum(t > 750)) <= 1
    assert np.sum(theirs > 750) > 5 * np.sum(theirs < 250)
    sigma = np.sqrt(1 / LINEAR.alpha_bar - 1)
    quantiles = stats.beta.ppf(np.linspace(1, 0, 40), 0.6, 0.6)
    by_sigma = sigma[0] + quantiles * (sigma[-1] - sigma[0])
    ours = grids.make(LINEAR, spacing=by_sigma, grid_unit="sigma")  # theirs, should anyone want it
    np.testing.assert_allclose(noise_of(ours), peer.sigmas[:-1].numpy(), rtol=5e-4)  # float32 alphas_cumprod


@pytest.mark.parametrize(
    ("name", "schedule", "published", "times"),
    [
        ("ays_sd", SD, "StableDiffusionSigmas", "StableDiffusionTimesteps"),
        ("ays_sdxl", SD, "StableDiffusionXLSigmas", "StableDiffusionXLTimesteps"),
        ("ays_svd", EDM(0.002, 700.0), "StableDiffusionVideoSigmas", None),
    ],
)
def test_align_your_steps(name, schedule, published, times):
    """Ten steps are the published ones, whose times too are published (rounded sigmas: to within two of 1000)."""
    grid = grids.make(schedule, 10, name)
    # 14.615 is said for 14.6146, the schedule's last.
    np.testing.assert_allclose(grid.sigma / grid.alpha, AysSchedules[published], rtol=1e-4)
    if times:
        np.testing.assert_allclose(grid.t, AysSchedules[times], atol=2)
    # Twenty halve every step in log sigma.
    fine = noise_of(grids.make(schedule, 20, name))
    np.testing.assert_allclose(fine[::2], noise_of(grid), rtol=1e-9)
    np.testing.assert_allclose(fine[1:-1:2], np.sqrt(fine[:-2:2] * fine[2::2]), rtol=2e-5)  # 14.615 again


def test_explicit_times_and_noise_levels():
    t = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]
    grid = grids.make(SD, spacing=t)
    np.testing.assert_array_equal(grid.t, t)
    np.testing.assert_allclose(grid.alpha[:-1], np.sqrt(SD.alpha_bar[t]), rtol=1e-12)
    sigmas = [14.6, 3.0, 0.5, 0.0]
    for given in (sigmas, sigmas[:-1], np.array(sigmas), "14.6,3.0,0.5,0.0"):  # with the landing or without
        grid = grids.make(SD, spacing=given, grid_unit="sigma")
        np.testing.assert_allclose(grid.sigma / grid.alpha, sigmas, rtol=1e-9)
    peer = diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    peer.set_timesteps(sigmas=sigmas)
    np.testing.assert_allclose(grid.t, peer.timesteps.numpy(), atol=0.01)  # float32 log sigma of the peer
    assert list(make("ddim", SD, grid="999,500,3").t) == [999, 500, 3]
    assert list(make("ddim", SD, 3, [999, 500, 3]).t) == [999, 500, 3]


@pytest.mark.parametrize(("schedule", "t"), [(EDM(), 200.0), (VE(), 1.2), (EDM(), 3.0)])
def test_a_variance_exploding_grid_starts_from_its_own_noise(schedule, t):
    """Above t_max as below it: x there is x_0 + sigma(t) eps, and sigma(t_max) eps would be too little."""
    grid = grids.make(schedule, spacing=[t, schedule.t_min])
    assert grid.prior_scale == pytest.approx(float(schedule.sigma(t)))
    assert make("euler", schedule, grid=grid).scale == grid.prior_scale


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: grids.make(LINEAR, 5, "trailin"), "'trailing'"),
        (lambda: grids.make(LINEAR, 5, "999,8x"), "commas"),
        (lambda: grids.make(LINEAR, None, "karras"), "steps"),
        (lambda: grids.make(LINEAR, 5, [999, 500]), "steps=2"),
        (lambda: grids.make(LINEAR, spacing=[500, 999]), "decreasing"),
        (lambda: grids.make(LINEAR, spacing=[1000, 500]), "999"),
        (lambda: grids.make(LINEAR, spacing=[500, 200], grid_unit="sigma"), "157.4"),
        (lambda: grids.make(LINEAR, spacing=[5, 0, -1], grid_unit="sigma"), "positive"),
        (lambda: grids.make(LINEAR, spacing=[5], grid_unit="sigmas"), "'sigma'"),
        (lambda: grids.make(schedules.make("flow"), spacing=[1.0, 0.0]), "no noise"),
        (lambda: grids.make(LINEAR, 5, "trailing", sigma_min=0.1), "karras"),
        (lambda: grids.make(LINEAR, 5, "karras", sigma_min=3.0, sigma_max=2.0), "sigma_min"),
        (lambda: grids.make(LINEAR, 5, "karras", sigma_max=1000.0), "157.4"),
        (lambda: make("ddim", LINEAR, 5, "karras", sigma_max="2,"), "sigma_max"),
        (lambda: grids.make(schedules.make("vp"), 5, "leading"), "discrete"),
        (lambda: grids.make(LINEAR, 5, "ays_svd"), "700"),
    ],
)
def test_mistakes_are_one_line_with_the_remedy(call, says):
    with pytest.raises(UserError) as e:
        call()
    assert says in str(e.value) and "\n" not in str(e.value)
