"""Our process and solver as a scheduler of diffusers': the inverse of scheduler.py, as far as there is one."""

from typing import Any

import numpy as np

from jax_diffusion import config as configs
from jax_diffusion import schedules
from jax_diffusion.errors import UserError
from jax_diffusion.interop.diffusers.scheduler import BETAS, PREDICTIONS


def write(process: configs.ConfigDict, sampling: configs.ConfigDict, *, unit_range: bool = False) -> dict[str, Any]:
    """scheduler_config.json of a config's process and sampling groups.

    unit_range: of a score model that was read as one of images in [0, 1] (ncsnpp.in_our_range).

    The recipe's solver where diffusers has it and its pipelines can run it, else DDIM's. UserError where the network
    itself cannot be run there: a continuous schedule other than flow, or another prediction than epsilon, x0, v.
    """
    theirs = {ours: name for name, ours in PREDICTIONS.items()}
    made = schedules.make(process.schedule.name, **configs.options(process.schedule))
    if process.prediction == "flow" and isinstance(made, schedules.Flow):
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}
    if process.prediction == "score" and isinstance(made, schedules.VE) and process.raw_inputs:
        return _score_sde_ve(made, sampling, 0.5 if unit_range else 1.0)
    if not made.steps or process.prediction not in theirs:
        raise UserError(
            f"process.schedule={process.schedule.name!r} with process.prediction={process.prediction!r} has no "
            f"scheduler in diffusers: a discrete schedule (linear, cosine, ...) with {', '.join(theirs)}, or flow with "
            "flow, has"
        )
    common = {**_betas(process.schedule, made), "prediction_type": theirs[process.prediction]}
    out = {**_class(sampling, process.learn_variance), **common, **_spacing(sampling)}
    if sampling.grid == "karras" and out["_class_name"] == "DPMSolverMultistepScheduler":
        out["use_karras_sigmas"] = True
    return out


def _score_sde_ve(made: schedules.VE, sampling: configs.ConfigDict, scale: float) -> dict[str, Any]:
    said = sampling.options
    return {
        "_class_name": "ScoreSdeVeScheduler",
        "num_train_timesteps": sampling.steps,
        "sigma_min": scale * made.sigma_min,
        "sigma_max": scale * made.sigma_max,
        "snr": said.get("snr", 0.15),
        "correct_steps": said.get("n_corrector", 1),
    }


def _betas(node: configs.ConfigDict, made: Any) -> dict[str, Any]:
    names = {ours: name for name, ours in BETAS.items()}
    options = configs.options(node)
    out: dict[str, Any] = {"num_train_timesteps": made.steps}
    if node.name in names and options.get("shift", 1.0) == 1.0:
        if node.name != "cosine":
            out |= {"beta_start": options.get("start", 1e-4), "beta_end": options.get("end", 0.02)}
        zero = {"rescale_betas_zero_snr": True} if options.get("zero_terminal_snr") else {}
        return {**out, "beta_schedule": names[node.name], **zero}
    log_snr = made.log_snr(np.arange(made.steps, dtype=np.float64))
    # alpha_bar = sigmoid(lambda), and 1 - its ratios.
    log_alpha_bar = -np.logaddexp(0.0, -log_snr)
    return {**out, "trained_betas": (-np.expm1(np.diff(log_alpha_bar, prepend=0.0))).tolist()}


def _class(sampling: configs.ConfigDict, learn_variance: bool) -> dict[str, Any]:
    said, clip = sampling.options, {"clip_sample": bool(sampling.clip)}
    if sampling.solver == "ddpm":
        variance = "learned_range" if learn_variance else said.get("variance", "fixed_small")
        return {"_class_name": "DDPMScheduler", "variance_type": variance, **clip}
    multistep = {"dpmpp_2m": 2, "dpmpp_3m": 3}
    # Their multistep schedulers cannot clip, and drop the variance only if told of it.
    if not sampling.clip and sampling.solver in multistep:
        variance = {"variance_type": "learned_range"} if learn_variance else {}
        order, kind = multistep[sampling.solver], said.get("solver_type", "midpoint")
        return {"_class_name": "DPMSolverMultistepScheduler", "solver_order": order, "solver_type": kind, **variance}
    if learn_variance:
        return {"_class_name": "DDPMScheduler", "variance_type": "learned_range", **clip}
    return {"_class_name": "DDIMScheduler", "set_alpha_to_one": said.get("final", "zero") == "zero", **clip}


def _spacing(sampling: configs.ConfigDict) -> dict[str, Any]:
    grid = (sampling.grid or "trailing").removesuffix("_open").removesuffix("_real")
    spacing = grid if grid in ("leading", "trailing", "linspace") else "trailing"
    return {"timestep_spacing": spacing, "steps_offset": int(sampling.options.get("offset", 0))}
