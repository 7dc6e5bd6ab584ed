"""Schedulers of diffusers in our terms: the same betas, the same points, and back."""

import diffusers
import numpy as np
import pytest

from jax_diffusion import config as configs
from jax_diffusion import experiment, process, schedules, solvers
from jax_diffusion.errors import UserError
from jax_diffusion.interop.diffusers import scheduler, scheduler_export

SPACINGS = ("leading", "trailing", "linspace")
OWN_SPACING = ("DPMSolverSinglestepScheduler",)  # it has one
TIMES = {"KDPM2": lambda t: t[::2], "Heun": lambda t: t[[0, *range(1, len(t), 2)]]}


def config_of(peer):
    return dict(peer.config) | {"_class_name": type(peer).__name__}


def schedule_of(node):
    return schedules.make(node.name, **configs.options(node))


def table_of(read, steps):
    made, s = schedule_of(read.process["schedule"]), read.sampling
    return solvers.make(s["solver"], made, steps, s["grid"] or None, **s["options"])


@pytest.mark.parametrize("steps", (5, 10, 25, 50))
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", scheduler.KINDS)
def test_same_points(name, spacing, steps):
    """Exactly the times that the peer visits, whatever its convention; times between the integers to float32."""
    options = {} if name in OWN_SPACING else {"timestep_spacing": spacing}
    peer = getattr(diffusers, name)(**options)
    peer.set_timesteps(steps)
    theirs = np.asarray(peer.timesteps, np.float64)
    for kind, of in TIMES.items():
        theirs = of(theirs) if kind in name else theirs
    if name == "PNDMScheduler":
        theirs = np.array(sorted(set(peer._timesteps.tolist()), reverse=True), np.float64)
    ours = table_of(scheduler.read(config_of(peer)), steps)
    ours = np.unique(ours.t)[::-1]  # singlestep methods and pseudo Runge-Kutta steps visit points between
    tolerance = 1e-3 if name in OWN_SPACING else 1e-4
    assert all(np.abs(ours - t).min() < tolerance for t in theirs), (theirs, ours)
    multiple_rows = ("PNDM", "KDPM2", "Singlestep")
    if not any(word in name for word in multiple_rows):
        assert len(ours) == len(theirs)


@pytest.mark.parametrize("name", scheduler.KINDS)
def test_same_betas(name):
    """To float32, in which diffusers computes them."""
    peer = getattr(diffusers, name)()
    ours = schedule_of(scheduler.read(config_of(peer)).process["schedule"])
    np.testing.assert_allclose(ours.betas, peer.betas.numpy().astype(np.float64), rtol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "sigmoid"},
        {"beta_schedule": "linear", "num_train_timesteps": 500, "beta_end": 0.04},
        {"trained_betas": np.linspace(1e-3, 0.05, 100).tolist()},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    ],
)
def test_schedules_and_back(options):
    """The noise at every timestep, and at every timestep of the config written back."""
    peer = diffusers.DDPMScheduler(**options)
    read = scheduler.read(config_of(peer))
    c = configs.default()
    c.process.update(prediction=read.process["prediction"])
    c.process.schedule = read.process["schedule"]
    again = diffusers.DDPMScheduler.from_config(scheduler_export.write(c.process, c.sampling))
    ours = schedule_of(read.process["schedule"]).alpha_bar
    # 1e-5: they multiply up to 1000 float32 numbers.
    for theirs in (peer, again):
        np.testing.assert_allclose(ours, theirs.alphas_cumprod.numpy().astype(np.float64), rtol=2e-5, atol=1e-9)
    assert again.config.prediction_type == peer.config.prediction_type


def test_prediction_clipping_and_variance():
    read = scheduler.read(config_of(diffusers.DDPMScheduler(variance_type="fixed_large_log", prediction_type="sample")))
    assert read.process["prediction"] == "x0" and read.sampling["clip"] and not read.process["learn_variance"]
    assert read.sampling["options"]["variance"] == "fixed_large"
    read = scheduler.read(config_of(diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False)))
    assert read.process["learn_variance"] and not read.sampling["clip"] and "variance" not in read.sampling["options"]
    peer = diffusers.DDIMScheduler(thresholding=True, sample_max_value=100.0, dynamic_thresholding_ratio=0.9)
    assert scheduler.read(config_of(peer)).sampling["threshold"] == pytest.approx(90)
    # Its default upper end of 1 makes thresholding plain clipping.
    assert "threshold" not in scheduler.read(config_of(diffusers.DDIMScheduler(thresholding=True))).sampling


def test_edm():
    peer = diffusers.EDMEulerScheduler(sigma_min=0.01, sigma_max=50.0)
    peer.set_timesteps(12)
    read = scheduler.read(config_of(peer))
    assert read.process["prediction"] == "edm"
    table = table_of(read, 12)
    np.testing.assert_allclose(table.t, peer.sigmas.numpy()[:-1], rtol=1e-5)
    gaussian = process.make(schedule_of(read.process["schedule"]), "edm", sigma_data=read.process["sigma_data"])
    c_noise = np.asarray(gaussian.parameterization.c_noise(np.float32(table.t)))
    np.testing.assert_allclose(c_noise, peer.timesteps.numpy(), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"_class_name": "LCMScheduler"}, "'LCMScheduler' has no equivalent"),
        ({"_class_name": "DDIMScheduler", "beta_schedule": "exp"}, "beta_schedule='exp'"),
        ({"_class_name": "DDIMScheduler", "prediction_type": "flow_prediction"}, "prediction_type='flow_prediction'"),
        ({"_class_name": "DDIMScheduler", "clip_sample_range": 2.0}, "clip_sample_range=2.0"),
        ({"_class_name": "DDPMScheduler", "variance_type": "learned"}, "variance_type='learned'"),
        ({"_class_name": "EulerDiscreteScheduler", "use_beta_sigmas": True}, "use_beta_sigmas=True"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "shift=3.0"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver"}, "algorithm_type="),
        ({"_class_name": "DDPMScheduler", "timestep_spacing": "middle"}, "timestep_spacing='middle'"),
    ],
)
def test_what_has_no_equivalent_is_said(options, says):
    with pytest.raises(UserError) as error:
        scheduler.read(options)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("recipe", ("digits", "mnist", "cifar10_ddpm", "imagenet64_adm", "imagenet256_dit_xl2"))
def test_our_recipes_can_be_written(recipe):
    """The scheduler that diffusers makes of it has our noise at every timestep and reads back as our process."""
    c = configs.resolve(recipe)
    written = scheduler_export.write(c.process, c.sampling)
    peer = getattr(diffusers, written["_class_name"]).from_config(written)
    ours = schedule_of(c.process.schedule).alpha_bar
    np.testing.assert_allclose(ours, peer.alphas_cumprod.numpy().astype(np.float64), rtol=2e-5, atol=1e-9)
    read = scheduler.read(config_of(peer))
    assert read.process["prediction"] == c.process.prediction
    assert read.process["learn_variance"] == c.process.learn_variance
    experiment.default_table(c, process.make(schedule_of(c.process.schedule), c.process.prediction))


def test_what_diffusers_cannot_run_is_said():
    c = configs.resolve("cifar10_edm")
    with pytest.raises(UserError, match="has no scheduler in diffusers"):
        scheduler_export.write(c.process, c.sampling)
