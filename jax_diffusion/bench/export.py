"""What PyTorch's worker is left by JAX's: the network's config and weights, and the numbers of the process.

network.json   class and config      weights.npz   its state dict      spec.json   training and sampling
"""

import json
import pathlib
from typing import Any

import numpy as np

from jax_diffusion import config as configs
from jax_diffusion import experiment
from jax_diffusion.bench.cases import Work
from jax_diffusion.errors import UserError
from jax_diffusion.interop import linear_attention_unet, weights
from jax_diffusion.interop.diffusers import dit, unet
from jax_diffusion.interop.imported import Architecture
from jax_diffusion.train.program import Program

CLASSES = {"unet": ("UNet2DModel", unet), "dit": ("DiTTransformer2DModel", dit)}


def write(folder: pathlib.Path, w: Work, config: configs.ConfigDict, built: Program, params: Any) -> None:
    """params: NumPy arrays. Raises UserError where PyTorch has no such network."""
    model = {"name": config.model.name, **configs.options(config.model)}
    a = Architecture(model, built.shape, built.num_classes, bool(config.process.learn_variance))
    if config.model.name == linear_attention_unet.NAME:
        network, entries = _lucidrains(model, built.shape), linear_attention_unet.entries(a)
    else:
        name, module = CLASSES[config.model.name]
        network, entries = {"class": name, "config": module.config_of(a)}, module.entries(a)
    (folder / "network.json").write_text(json.dumps(network))
    np.savez(folder / "weights.npz", **weights.save(entries, params))
    (folder / "spec.json").write_text(json.dumps(spec(w, config, built)))


def _lucidrains(model: dict[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
    count = len(model["multipliers"])
    full = {l % count for l in model["full_attention_levels"]}
    options = {
        "dim": model["channels"],
        "dim_mults": list(model["multipliers"]),
        "channels": shape[-1],
        "dropout": model["dropout"],
        "attn_heads": model["heads"][0],
        "attn_dim_head": model["head_channels"][0],
        "full_attn": [l in full for l in range(count)],
    }
    return {"class": "Unet", "config": options}


def spec(w: Work, config: configs.ConfigDict, built: Program) -> dict[str, Any]:
    """Numbers that both frameworks share. UserError for what PyTorch's side was not written for."""
    p, o, e, s = config.process, config.optim, config.ema, config.sampling
    odd = {
        f"process.prediction={p.prediction}": p.prediction != "epsilon",
        f"process.weighting={p.weighting.name}": p.weighting.name != "simple",
        f"process.timesteps={p.timesteps.name}": p.timesteps.name != "uniform",
        f"condition={config.condition.name}": config.condition.name != "none",
        f"optim.weight_decay={o.weight_decay}": o.weight_decay != 0,
        f"optim.schedule={o.schedule}, warmup={o.warmup}": o.schedule != "constant" or o.warmup > 0,
        f"ema.profiles={e.profiles}": bool(e.profiles),
        f"sampling.solver={s.solver}": s.solver != "ddim",
        f"train.accumulate={config.train.accumulate}": config.train.accumulate > 1,
    }
    found = [name for name, wrong in odd.items() if wrong]
    if found:
        raise UserError(f"--config: bench has no PyTorch counterpart for {', '.join(found)}; or use --only=jax")
    schedule: Any = built.parts.process.schedule
    return {
        "shape": list(built.shape),
        "num_classes": built.num_classes,
        "null_label": bool(config.model.get("null_label", False)),
        "betas": np.asarray(schedule.betas, np.float64).tolist(),
        "schedule": p.schedule.name,
        "learn_variance": bool(p.learn_variance),
        "flip": bool(config.data.flip),
        "label_dropout": config.train.label_dropout if built.num_classes else 0.0,
        "optim": {k: o[k] for k in ("learning_rate", "b1", "b2", "eps", "clip")},
        "ema": {"decay": e.decay, "warmup": e.warmup},
        "times": np.asarray(experiment.default_table(config, built.parts.process).t).tolist(),
        "clip": bool(s.clip),
        "clipped_epsilon": bool(s.options.get("use_clipped_model_output", True)),
        "guidance": float(w.about.guidance),
    }
