"""lucidrains' denoising_diffusion_pytorch: the milestones of its Trainer, and what they are made of.

    model-7.pt     {"model": a GaussianDiffusion's state dict, "ema": ema_pytorch's of it, "opt", "step", ...}
    GaussianDiffusion's state dict     the network under "model.", and buffers: betas, alphas_cumprod, loss_weight, ...
    Unet's state dict                  the network alone: schedule and objective have to be said

The class-conditional network of its classifier_free_guidance is read too. The buffers say the schedule (betas) and,
with it, objective and weighting: loss_weight is clipped SNR / SNR for pred_noise, clipped SNR for pred_x0 and clipped
SNR / (SNR + 1) for pred_v, where the clip is that of min-SNR or none.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jax_diffusion import config as configs
from jax_diffusion import schedules
from jax_diffusion.errors import UserError, choose
from jax_diffusion.interop import linear_attention_unet as network
from jax_diffusion.interop import weights
from jax_diffusion.interop.imported import Architecture, Imported, build
from jax_diffusion.interop.tensors import Tensors

DESCRIPTION = "denoising_diffusion_pytorch (lucidrains): model-N.pt, or a state dict of GaussianDiffusion or Unet"
OBJECTIVES = {"pred_noise": "epsilon", "pred_x0": "x0", "pred_v": "v"}
BETA_SCHEDULES = ("linear", "cosine", "sigmoid")
# Where the raw and the averaged GaussianDiffusion, or network, may lie.
RAW = ("model.", "", "online_model.", "ema.online_model.")
AVERAGED = ("ema.ema_model.", "ema_model.")
# One of these is enough, so that damage is reported as such.
_SIGNS = ("init_conv.weight", "downs.0.0.block1.proj.weight", "final_res_block.block1.proj.weight")


def matches(tensors: Tensors) -> bool:
    return _find(tensors, (*RAW, *AVERAGED)) is not None


def _find(tensors: Tensors, roots: tuple[str, ...]) -> tuple[str, str] | None:
    """(where the GaussianDiffusion lies, where in it the network), of the first root that holds one."""
    for inner in ("model.", ""):
        for root in roots:
            if any(root + inner + name in tensors for name in _SIGNS):
                return root, inner
    return None


def read(
    tensors: Tensors,
    *,
    image_size: Any = None,  # of the samples, N or (H, W): nothing in the file says it
    objective: str | None = None,  # pred_noise, pred_x0, pred_v; None: as loss_weight says
    beta_schedule: str | None = None,  # linear, cosine, sigmoid; None: as betas says
    timesteps: int = 1000,  # of beta_schedule
    sampling_timesteps: int | None = None,  # DDIM with so many steps; None: DDPM with all
    max_period: float = 10_000.0,  # sinusoidal_pos_emb_theta
    head_channels: int = 32,  # attn_dim_head, where no mem_kv says it (class-conditional networks)
) -> Imported:
    """The model; `ema` is the average where the file has one. Raises UserError for whatever does not fit."""
    for name, value in (("max_period", max_period), ("head_channels", head_channels)):
        if type(value) not in (int, float) or value < 1:
            raise UserError(f"{name}={value!r}: give a number from 1 on")
    raw, averaged = _find(tensors, RAW), _find(tensors, AVERAGED)
    first = raw or averaged
    if first is None:
        raise UserError(f"{tensors.path} holds no Unet of denoising_diffusion_pytorch: it lacks {_SIGNS[0]}")
    root, inner = first
    diffusion, net = tensors.under(root), tensors.under(root + inner)
    if "betas" in diffusion:
        _check_buffers(diffusion)
    shape = _shape(tensors, image_size)
    architecture, notes = network.architecture(net, shape, max_period, head_channels)
    schedule, said = _schedule(diffusion, beta_schedule, timesteps)
    prediction, weighting, assumed = _objective(diffusion, objective, said, architecture.learn_variance)
    notes = [*notes, *assumed, "auto_normalize=True was assumed: pixels in [0, 1] shown to the network as [-1, 1]"]
    if architecture.num_classes:
        notes.append("guidance is plain: the package's own (cond_scale=6, rescaled_phi=0.7, no parallel part) differs")
    return build(
        architecture,
        network.entries(architecture),
        net,
        ema=None if raw is None or averaged is None else tensors.under("".join(averaged)),
        process={"schedule": schedule, "prediction": prediction, "weighting": weighting},
        sampling=_sampling(tensors, len(said.betas), sampling_timesteps),
        notes=notes,
    )


def _shape(tensors: Tensors, image_size: Any) -> tuple[int, int]:
    if image_size is None:
        raise UserError(f"{tensors.path} does not say the size of its images: give image_size, N or (H, W)")
    size = (image_size,) * 2 if isinstance(image_size, int) else image_size
    if not isinstance(size, tuple | list) or len(size) != 2 or not all(type(n) is int and n > 0 for n in size):
        raise UserError(f"image_size={image_size!r}: give one positive number, or (H, W)")
    return tuple(size)


def _check_buffers(diffusion: Tensors) -> None:
    unknown = sorted(n for n in diffusion if not n.startswith("model.") and n not in _buffer_names())
    if unknown:
        raise UserError(f"{diffusion.path}: unknown tensors beside the network: {', '.join(unknown[:8])}")


def _schedule(diffusion: Tensors, name: str | None, timesteps: int) -> tuple[configs.ConfigDict, schedules.Discrete]:
    """The schedule in our words, and made."""
    if name is not None:
        choose("beta_schedule", name, BETA_SCHEDULES)
        if type(timesteps) is not int or timesteps < 2:
            raise UserError(f"timesteps={timesteps!r}: give the number of betas, 1000 in most networks")
        return _named(name, timesteps)
    if "betas" not in diffusion or "alphas_cumprod" not in diffusion:
        raise UserError(
            f"{diffusion.path} holds a network without the buffers of its GaussianDiffusion: give beta_schedule "
            f"({', '.join(BETA_SCHEDULES)}) and objective ({', '.join(OBJECTIVES)}), as it was trained"
        )
    betas, bar = (diffusion[n].astype(np.float64) for n in ("betas", "alphas_cumprod"))
    if betas.shape != bar.shape or betas.ndim != 1 or not np.allclose(np.cumprod(1 - betas), bar, rtol=1e-3, atol=1e-7):
        raise UserError(f"{diffusion.path} is damaged: alphas_cumprod is not the product of 1 - betas")
    for name in BETA_SCHEDULES:
        if name == "linear" and len(betas) <= 20:
            continue  # its betas would pass 1
        config, made = _named(name, len(betas))
        # Sigmoid's ends are float32 in the package, which moves the last betas.
        if np.allclose(made.betas, betas, rtol=2e-6 if name != "sigmoid" else 1e-3, atol=0):
            return config, made
    config = configs.named("betas", values=tuple(map(float, betas)))
    explicit: Any = schedules.make("betas", values=config["values"])
    return config, explicit


def _named(name: str, steps: int) -> tuple[configs.ConfigDict, Any]:
    # Its linear betas are DDPM's for 1,000 steps, and scaled for other numbers.
    ends = {"start": 0.1 / steps, "end": 20 / steps} if name == "linear" else {}
    ours = {"sigmoid": "sigmoid_alpha_bar"}.get(name, name)
    return configs.named(ours, steps=steps, **ends), schedules.make(ours, steps=steps, **ends)


def _objective(
    diffusion: Tensors, objective: str | None, schedule: schedules.Discrete, learn_variance: bool
) -> tuple[str, configs.ConfigDict, list[str]]:
    """(prediction, weighting, notes): what loss_weight says, or was said."""
    snr = np.exp(schedule.log_snr_table)
    relative = {"pred_noise": 1 / snr, "pred_x0": np.ones_like(snr), "pred_v": 1 / (snr + 1)}
    if objective is not None:
        choose("objective", objective, OBJECTIVES)
    fits = {}
    if "loss_weight" in diffusion and diffusion.shapes["loss_weight"] == snr.shape:
        weight = diffusion["loss_weight"].astype(np.float64)
        for name, factor in relative.items():
            clipped = weight / factor
            if np.allclose(clipped, np.minimum(snr, clipped.max()), rtol=5e-3, atol=0):
                fits[name] = clipped.max()
    if objective is None:
        if len(fits) != 1:
            raise UserError(
                f"{diffusion.path} does not say what its network predicts (no loss_weight of pred_noise, pred_x0 or "
                f"pred_v): give objective ({', '.join(OBJECTIVES)})"
            )
        (objective,) = fits
    if objective not in fits:
        said = f": loss_weight says {next(iter(fits))}" if fits else ""
        return OBJECTIVES[objective], configs.named("simple"), [f"objective={objective} as given{said}"]
    gamma = fits[objective]
    if gamma < snr.max() * 0.99:
        weighting = configs.named("min_snr", gamma=float(np.round(gamma, 5)))
    elif objective == "pred_noise" or learn_variance:
        weighting = configs.named("simple")
    else:
        weighting = configs.named("p2", gamma=0.0)  # SNR, in x0 space
    return OBJECTIVES[objective], weighting, []


def _sampling(tensors: Tensors, total: int, steps: int | None) -> dict[str, Any]:
    if steps is None or steps == total:
        return {"solver": "ddpm", "steps": total, "clip": True}
    if type(steps) is not int or not 0 < steps < total:
        raise UserError(f"sampling_timesteps={steps}: {tensors.path} was trained with {total}; give 1 to {total}")
    times = ",".join(str(t) for t in ddim_times(total, steps))
    return {"solver": "ddim", "steps": steps, "grid": times, "clip": True}


def ddim_times(total: int, steps: int) -> list[int]:
    """The times at which its ddim_sample evaluates the network: linspace(-1, total - 1), cut off to integers."""
    step = np.float32(total) / np.float32(steps)
    # From both ends in float32, as torch.linspace does.
    up = np.float32(-1) + step * np.arange(steps + 1, dtype=np.float32)
    down = np.float32(total - 1) - step * np.arange(steps, -1, -1, dtype=np.float32)
    return [int(t) for t in np.where(np.arange(steps + 1) < (steps + 1) // 2, up, down)[:0:-1]]


def write(model: Any) -> dict[str, np.ndarray]:
    """GaussianDiffusion's state dict of an Imported or a Model: of the network bit for bit what was read.

    Raises UserError where the package has no such network or process.
    """
    config, classes = model.config, len(model.class_names)
    architecture = Architecture(
        {"name": config.model.name, **configs.options(config.model)},
        tuple(model.shape),
        classes,
        config.process.learn_variance,
    )
    objective = {ours: theirs for theirs, ours in OBJECTIVES.items()}.get(config.process.prediction)
    schedule = schedules.make(config.process.schedule.name, **configs.options(config.process.schedule))
    if objective is None or not isinstance(schedule, schedules.Discrete) or schedule.ends_in_pure_noise:
        raise UserError(
            f"process.prediction={config.process.prediction} on process.schedule={config.process.schedule.name}: "
            "denoising_diffusion_pytorch has epsilon, x0 and v on a schedule of betas below 1"
        )
    named = weights.save(network.entries(architecture), model.params)
    return {f"model.{name}": a for name, a in named.items()} | _buffers(schedule, objective, config.process.weighting)


def _buffers(schedule: schedules.Discrete, objective: str, weighting: Mapping[str, Any]) -> dict[str, np.ndarray]:
    betas, bar = schedule.betas, schedule.alpha_bar
    before = np.append(1.0, bar[:-1])
    variance = betas * (1 - before) / (1 - bar)
    snr = bar / (1 - bar)
    clipped = np.minimum(snr, weighting["gamma"]) if weighting["name"] == "min_snr" else snr
    out = {
        "betas": betas,
        "alphas_cumprod": bar,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": np.sqrt(bar),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - bar),
        "log_one_minus_alphas_cumprod": np.log(1 - bar),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / bar),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / bar - 1),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": betas * np.sqrt(before) / (1 - bar),
        "posterior_mean_coef2": (1 - before) * np.sqrt(1 - betas) / (1 - bar),
        "loss_weight": {"pred_noise": clipped / snr, "pred_x0": clipped, "pred_v": clipped / (snr + 1)}[objective],
    }
    return {name: a.astype(np.float32) for name, a in out.items()}


def _buffer_names() -> frozenset[str]:
    linear: Any = schedules.make("linear", steps=2)  # Discrete, as all that are made here
    return frozenset(_buffers(linear, "pred_noise", {"name": "simple"}))
