"""diffusers' schedulers: which process the network was trained for, and which solver its pipeline runs.

    process, sampling, notes = read(config)      # of scheduler_config.json

What a field cannot mean here is an error; what only moves a point of the grid or a default is a note.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jax_diffusion import config as configs
from jax_diffusion.errors import UserError, did_you_mean

BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine", "sigmoid": "sigmoid"}
PREDICTIONS = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}
VARIANCES = {"fixed_small": "fixed_small", "fixed_small_log": "fixed_small", "fixed_large": "fixed_large",
             "fixed_large_log": "fixed_large"}  # fmt: skip


class Read(NamedTuple):
    """Fields of config.process and config.sampling, and what should be known about them."""

    process: dict[str, Any]
    sampling: dict[str, Any]
    notes: list[str]


class Kind(NamedTuple):
    """A class of schedulers: which of our solvers it is, and its own defaults where classes differ."""

    solver: str
    steps: int = 50
    spacing: str = "linspace"
    multistep: bool = False  # N + 1 points less the last
    real: bool = False  # "linspace" is not rounded
    betas: tuple[float, float] = (1e-4, 0.02)
    clips: bool = False  # clip_sample by default


KINDS = {
    "DDPMScheduler": Kind("ddpm", 1000, "leading", clips=True),
    "DDIMScheduler": Kind("ddim", 50, "leading", clips=True),
    "PNDMScheduler": Kind("pndm", 50, "leading"),
    "LMSDiscreteScheduler": Kind("lms", real=True),
    "EulerDiscreteScheduler": Kind("euler", real=True),
    "EulerAncestralDiscreteScheduler": Kind("euler_ancestral", real=True),
    "HeunDiscreteScheduler": Kind("heun", 25, real=True, betas=(0.00085, 0.012)),
    "KDPM2DiscreteScheduler": Kind("dpm2", 25, real=True, betas=(0.00085, 0.012)),
    "KDPM2AncestralDiscreteScheduler": Kind("dpm2_ancestral", 25, real=True, betas=(0.00085, 0.012)),
    "DPMSolverMultistepScheduler": Kind("dpmpp_2m", 20, multistep=True),
    "DPMSolverSinglestepScheduler": Kind("dpmpp_2s", 20, multistep=True),
    "DEISMultistepScheduler": Kind("deis", 20, multistep=True),
    "UniPCMultistepScheduler": Kind("unipc", 20, multistep=True),
}


def read(config: Mapping[str, Any]) -> Read:
    """The process and the solver of a scheduler_config.json. UserError where there is no equivalent."""
    name = str(config.get("_class_name", ""))
    if name in KINDS:
        return _discrete(KINDS[name], name, config)
    others = {
        "EDMEulerScheduler": _edm,
        "EDMDPMSolverMultistepScheduler": _edm,
        "FlowMatchEulerDiscreteScheduler": _flow,
        "FlowMatchHeunDiscreteScheduler": _flow,
        "ScoreSdeVeScheduler": _score_sde_ve,
    }
    if name not in others:
        known = [*KINDS, *others]
        raise UserError(
            f"scheduler {name!r} has no equivalent here: {did_you_mean(name, known)}{', '.join(known)} have"
        )
    return others[name](name, config)


def _unsupported(name: str, config: Mapping[str, Any], **harmless: Any) -> None:
    """Raises a UserError listing the fields that are set to something else than the value that is harmless."""
    odd = [f"{k}={config[k]!r}" for k, v in harmless.items() if config.get(k, v) not in (v, None)]
    if odd:
        raise UserError(f"{name}: {', '.join(odd)} has no equivalent here; set it to its default to load the rest")


def schedule(config: Mapping[str, Any], betas: tuple[float, float] = (1e-4, 0.02)) -> configs.ConfigDict:
    """The discrete schedule of beta_schedule, beta_start, ... or trained_betas."""
    options: dict[str, Any] = {}
    if config.get("rescale_betas_zero_snr"):
        options["zero_terminal_snr"] = True
    if config.get("trained_betas") is not None:
        return configs.named("betas", values=tuple(float(b) for b in config["trained_betas"]), **options)
    name = config.get("beta_schedule", "linear")
    if name not in BETAS:
        raise UserError(f"beta_schedule={name!r} has no equivalent here: choose one of {', '.join(BETAS)}")
    options = {"steps": int(config.get("num_train_timesteps", 1000)), **options}
    if BETAS[name] != "cosine":
        start, end = config.get("beta_start", betas[0]), config.get("beta_end", betas[1])
        options |= {"start": float(start), "end": float(end)}
    return configs.named(BETAS[name], **options)


def _prediction(name: str, config: Mapping[str, Any], known: Mapping[str, str] = PREDICTIONS) -> str:
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in known:
        raise UserError(f"{name}: prediction_type={prediction!r} has no equivalent here; {', '.join(known)} have")
    return known[prediction]


def _clipping(kind: Kind, name: str, config: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """clip and threshold of the sampling group. diffusers thresholds between 1 and sample_max_value."""
    if config.get("thresholding"):
        most = float(config.get("sample_max_value", 1.0))
        if most <= 1:
            return {"clip": True}
        notes.append(f"sample_max_value={most:g} was left out: our dynamic thresholding has no upper end")
        return {"clip": True, "threshold": 100 * float(config.get("dynamic_thresholding_ratio", 0.995))}
    clip = bool(config.get("clip_sample", kind.clips))
    if clip:
        _unsupported(name, config, clip_sample_range=1.0)
    return {"clip": clip}


def _grid(kind: Kind, name: str, config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The spacing and its options."""
    _unsupported(name, config, use_beta_sigmas=False, use_flow_sigmas=False, use_dynamic_shifting=False,
                 timestep_type="discrete", sigma_min=None, sigma_max=None, shift_terminal=None)  # fmt: skip
    for field, spacing in (("use_karras_sigmas", "karras"), ("use_exponential_sigmas", "exponential"),
                           ("use_lu_lambdas", "log_snr")):  # fmt: skip
        if config.get(field):
            return spacing, {}
    spacing = config.get("timestep_spacing", kind.spacing)
    if spacing not in ("leading", "trailing", "linspace"):
        raise UserError(f"{name}: timestep_spacing={spacing!r} is unknown: choose leading, trailing or linspace")
    offset = int(config.get("steps_offset", 0)) if spacing == "leading" else 0
    if spacing != "trailing" and kind.multistep:
        spacing = f"{spacing}_open"
    if spacing == "linspace" and kind.real:
        spacing = "linspace_real"
    return spacing, {"offset": offset} if offset else {}


def _discrete(kind: Kind, name: str, config: Mapping[str, Any]) -> Read:
    notes: list[str] = []
    of_clipping = _clipping(kind, name, config, notes)
    grid, options = _grid(kind, name, config)
    solver, of_solver = _solver(kind, name, config, of_clipping["clip"], notes)
    of_schedule = schedule(config, kind.betas)
    total = of_schedule["steps"] if "steps" in of_schedule else len(of_schedule["values"])
    process = {
        "schedule": of_schedule,
        "prediction": _prediction(name, config),
        "learn_variance": _learns_variance(name, config),
    }
    steps = max(min(kind.steps, total - kind.multistep), 1)
    sampling = {"solver": solver, "steps": steps, "grid": grid, "options": {**options, **of_solver}, **of_clipping}
    return Read(process, sampling, notes)


def _learns_variance(name: str, config: Mapping[str, Any]) -> bool:
    variance = config.get("variance_type")
    if variance in (None, "learned_range", *VARIANCES):
        return variance == "learned_range"
    raise UserError(f"{name}: variance_type={variance!r} has no equivalent here: learned_range and fixed ones have")


def _solver(
    kind: Kind, name: str, config: Mapping[str, Any], clip: bool, notes: list[str]
) -> tuple[str, dict[str, Any]]:
    """Our solver and its options, with those of the grid's last point."""
    order = int(config.get("solver_order", 2))
    lands = config.get("final_sigmas_type", "zero") == "zero"
    end = {} if lands else {"final": "min"}
    if np.isfinite(config.get("lambda_min_clipped", -np.inf)):
        notes.append(f"lambda_min_clipped={config['lambda_min_clipped']:g} was left out: the grid starts at its end")
    match name:
        case "DDPMScheduler":
            variance = config.get("variance_type", "fixed_small")
            return "ddpm", {} if variance == "learned_range" else {"variance": VARIANCES.get(variance, variance)}
        case "DDIMScheduler":
            to_min = {} if config.get("set_alpha_to_one", True) else {"final": "min"}
            return "ddim", to_min | ({"use_clipped_model_output": False} if clip else {})
        case "PNDMScheduler":
            to_min = {} if config.get("set_alpha_to_one", False) else {"final": "min"}
            solver = "plms" if config.get("skip_prk_steps") else "pndm"
            return solver, {"lower_order_final": False, **to_min}
        case "LMSDiscreteScheduler":
            return "lms", {"lower_order_final": False}
        case "DEISMultistepScheduler":
            return "deis", {"order": order, "final": "min"}
        case "UniPCMultistepScheduler":
            off = list(config.get("disable_corrector") or [])
            if off:
                notes.append(f"disable_corrector={off} was left out: the corrector runs at every step")
            bh = {"solver_type": config.get("solver_type", "bh2"), "predict_x0": bool(config.get("predict_x0", True))}
            return "unipc", {"order": order, **bh, **end}
        case "DPMSolverMultistepScheduler" | "DPMSolverSinglestepScheduler":
            return _dpm_solver(name, config, order, end)
    return kind.solver, end


def _dpm_solver(name: str, config: Mapping[str, Any], order: int, end: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    single = "Singlestep" in name
    algorithm = config.get("algorithm_type", "dpmsolver++")
    kinds = {"dpmsolver": "dpm_solver_", "dpmsolver++": "dpmpp_", "sde-dpmsolver++": "sde_dpmpp_"}
    if algorithm not in kinds or (single and algorithm.startswith("sde")):
        raise UserError(f"{name}: algorithm_type={algorithm!r} has no equivalent here; {', '.join(kinds)} have")
    if order == 1:
        return {"dpmsolver": "dpm_solver_1", "dpmsolver++": "ddim"}.get(algorithm, "euler_ancestral"), end
    if order not in (2, 3):
        raise UserError(f"{name}: solver_order={order} has no equivalent here: 1, 2 and 3 have")
    kind = config.get("solver_type", "midpoint")
    if single:
        solver = f"{kinds[algorithm]}{order}" + ("s" if algorithm != "dpmsolver" else "")
        return solver, {"solver_type": kind, "share_steps": True, **end}
    third = {"half_curvature": True} if order == 3 else {}
    return f"{kinds[algorithm]}{order}m", {"solver_type": kind, **third, **end}


def _edm(name: str, config: Mapping[str, Any]) -> Read:
    """Karras et al. 2022: preconditioning and noise levels."""
    _prediction(name, config, {"epsilon": "edm"})
    _unsupported(name, config, thresholding=False, euler_at_final=False)
    low, high = float(config.get("sigma_min", 0.002)), float(config.get("sigma_max", 80.0))
    grid = config.get("sigma_schedule") or "karras"
    options: dict[str, Any] = {"sigma_min": low, "sigma_max": high}
    options |= {"rho": float(config.get("rho", 7.0))} if grid == "karras" else {}
    solver = "euler"
    if "DPMSolver" in name:
        solver, of_solver = _dpm_solver(name, config, int(config.get("solver_order", 2)), {})
        options |= of_solver
    if config.get("final_sigmas_type", "zero") != "zero":
        options["final"] = "min"
    process = {
        "schedule": configs.named("edm", t_min=low, t_max=high),
        "prediction": "edm",
        "sigma_data": float(config.get("sigma_data", 0.5)),
    }
    return Read(process, {"solver": solver, "steps": 50, "grid": grid, "options": options, "clip": False}, [])


def _flow(name: str, config: Mapping[str, Any]) -> Read:
    """Rectified flow; the network is shown 1000 t."""
    _unsupported(name, config, shift=1.0, use_dynamic_shifting=False, invert_sigmas=False, shift_terminal=None,
                 use_karras_sigmas=False, use_exponential_sigmas=False, use_beta_sigmas=False,
                 stochastic_sampling=False, num_train_timesteps=1000)  # fmt: skip
    notes = ["the grid is t = 1 to 1/N: diffusers' N points go from 1 to 1/1000"]
    solver = "heun" if "Heun" in name else "euler"
    sampling = {"solver": solver, "steps": 50, "grid": "uniform", "options": {}, "clip": False}
    return Read({"schedule": configs.named("flow"), "prediction": "flow"}, sampling, notes)


def _score_sde_ve(name: str, config: Mapping[str, Any]) -> Read:
    """NCSN++ on the VE-SDE (Song et al. 2021): the score of x_t at sigma, no input scaling."""
    low, high = float(config.get("sigma_min", 0.01)), float(config.get("sigma_max", 1348.0))
    process = {
        "schedule": configs.named("ve", sigma_min=low, sigma_max=high),
        "prediction": "score",
        "raw_inputs": True,
    }
    options = {"snr": float(config.get("snr", 0.15)), "n_corrector": int(config.get("correct_steps", 1))}
    steps = int(config.get("num_train_timesteps", 2000))
    sampling = {"solver": "predictor_corrector", "steps": steps, "grid": "", "options": options, "clip": False}
    return Read(process, sampling, [])
