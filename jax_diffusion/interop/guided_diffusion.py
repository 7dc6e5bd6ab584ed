"""State dicts of openai/guided-diffusion (ADM; Dhariwal & Nichol 2021), and of its predecessor improved-diffusion.

    imported = interop.open_model("64x64_diffusion.pt")                         # a published one, known by its name
    imported = interop.open_model("ema_0.9999_100000.pt", image_size=64, heads=4)
    c = guided_diffusion.read_classifier(tensors.open_file("64x64_classifier.pt"))

Names and shapes tell the architecture; the size of the images, the heads of the attention and the order of its q, k
and v, and the process are options, or come from the flags that a published checkpoint is documented with.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_diffusion import config as configs
from jax_diffusion.errors import UserError, choose
from jax_diffusion.interop import adm_parts, unet_parts, weights
from jax_diffusion.interop.adm_parts import classifier_entries, entries
from jax_diffusion.interop.imported import Architecture, Imported, build
from jax_diffusion.interop.tensors import Tensors
from jax_diffusion.models import Network, layers, unet
from jax_diffusion.models.encoder import encoder
from jax_diffusion.models.resnet import level_widths

__all__ = ["DESCRIPTION", "PRESETS", "Classifier", "entries", "matches", "read", "read_classifier", "write"]

DESCRIPTION = "openai/guided-diffusion and improved-diffusion: U-Nets and classifiers (.pt, .safetensors)"

_LSUN = {"image_size": 256, "head_channels": 64, "dropout": 0.1}
PRESETS: dict[str, dict[str, Any]] = {  # the flags in the original's README, where names and shapes do not tell
    "64x64_diffusion": {"image_size": 64, "head_channels": 64, "new_attention_order": True,
                        "noise_schedule": "cosine", "dropout": 0.1},
    "128x128_diffusion": {"image_size": 128, "heads": 4},
    "256x256_diffusion": {"image_size": 256, "head_channels": 64},
    "256x256_diffusion_uncond": {"image_size": 256, "head_channels": 64},
    "512x512_diffusion": {"image_size": 512, "head_channels": 64},
    "64_256_upsampler": {"image_size": 256, "heads": 4, "factor": 4},
    "128_512_upsampler": {"image_size": 512, "head_channels": 64, "factor": 4},
    "lsun_bedroom": _LSUN,
    "lsun_cat": _LSUN,
    "lsun_horse": _LSUN,
    "lsun_horse_nodropout": _LSUN | {"dropout": 0.0},
}  # fmt: skip
CLASSIFIERS = {
    "64x64_classifier": {"image_size": 64, "blocks": 4},
    "128x128_classifier": {"image_size": 128, "blocks": 2},
    "256x256_classifier": {"image_size": 256, "blocks": 2},
    "512x512_classifier": {"image_size": 512, "blocks": 2},
}
SCHEDULES = ("linear", "cosine")


class Classifier(NamedTuple):
    """A classifier of noisy images, for guidance: see models/encoder.py."""

    network: Network
    params: dict[str, Any]
    shape: tuple[int, int, int]
    options: dict[str, Any]  # of `encoder`
    notes: tuple[str, ...]


def matches(tensors: Tensors) -> bool:
    """Whether the names are those of guided-diffusion, and of nothing that was built on it."""
    names = ("time_embed.0.weight", "input_blocks.0.0.weight", "middle_block.0.in_layers.0.weight")
    return all(name in tensors for name in names) and not any("transformer_blocks" in name for name in tensors)


def read(
    tensors: Tensors,
    *,
    preset: str = "",  # a published checkpoint; "": the one the file is named after, if it is
    image_size: int = 0,  # pixels a side
    heads: int = 0,  # attention heads (num_heads), or
    head_channels: int = 0,  # channels per head (num_head_channels)
    new_attention_order: bool = False,  # use_new_attention_order
    noise_schedule: str = "linear",  # or cosine
    steps: int = 1000,  # diffusion_steps
    rescale_timesteps: bool | None = None,  # timesteps shown as if there were 1,000 (improved-diffusion's default)
    predict: str = "epsilon",  # x0: predict_xstart
    dropout: float = 0.0,  # for training on
    factor: int = 4,  # super-resolution: large_size / small_size
) -> Imported:
    """The model. Raises UserError for whatever does not fit, and where an option that decides is missing."""
    given = {"image_size": image_size, "heads": heads, "head_channels": head_channels, "dropout": dropout,
             "new_attention_order": new_attention_order, "noise_schedule": noise_schedule,
             "factor": factor}  # fmt: skip
    o, notes = _with_preset(tensors, preset, given, PRESETS, {"noise_schedule": "linear", "factor": 4})
    choose("noise_schedule", o["noise_schedule"], SCHEDULES)
    choose("predict", predict, ("epsilon", "x0"))
    if not adm_parts.count(tensors, "output_blocks"):
        raise UserError(f"{tensors.path} is a classifier, which draws nothing: read_classifier reads it, for guidance")
    model = adm_parts.unet_options(tensors) | _heads(tensors, o) | {"dropout": float(o["dropout"])}
    if steps != 1000 and rescale_timesteps is None:
        raise UserError(
            f"steps={steps}: say how the network was shown them, rescale_timesteps=true as if there were 1,000 "
            "(improved-diffusion's default) or rescale_timesteps=false as they are (guided-diffusion's)"
        )
    model["time_scale"] = 1000 / steps if rescale_timesteps else 1.0
    channels, learn_variance, more = _channels(tensors)
    # Scaled as the original does, so that T steps end where 1,000 do.
    betas = {"start": 0.1 / steps, "end": 20.0 / steps} if o["noise_schedule"] == "linear" else {}
    classes = tensors.shapes.get("label_emb.weight", (0,))[0]
    shape, beside = (o["image_size"], o["image_size"], channels), channels if more else 0
    architecture = Architecture(model | {"cond_channels": beside}, shape, classes, learn_variance, beside)
    imported = build(
        architecture,
        entries(architecture, new_attention_order=o["new_attention_order"]),
        tensors,
        process={
            "schedule": configs.named(o["noise_schedule"], steps=steps, **betas),
            "prediction": predict,
        },
        sampling={
            "solver": "ddpm",
            "steps": min(250, steps),
            "grid": "linspace",
            **({} if learn_variance else {"options": {"variance": "fixed_large"}}),
        },
        notes=notes,
    )
    if more:
        imported.config.condition = configs.named("low_resolution", factor=int(o["factor"]), interpolation="bilinear")
    return imported


def read_classifier(
    tensors: Tensors,
    *,
    preset: str = "",  # a published checkpoint; "": the one the file is named after, if it is
    image_size: int = 0,  # pixels a side
    heads: int = 0,  # attention heads, or
    head_channels: int = 0,  # channels per head; 0: 64 unless heads are given
    new_attention_order: bool = False,
    blocks: int = 0,  # residual blocks a level (classifier_depth), where the names leave it open
) -> Classifier:
    """A classifier with any of the original's pools. Raises UserError for whatever does not fit."""
    given = {"image_size": image_size, "blocks": blocks, "heads": heads,
             "head_channels": head_channels or (0 if heads else 64)}  # fmt: skip
    o, notes = _with_preset(tensors, preset, given, CLASSIFIERS, {"head_channels": 64})
    if adm_parts.count(tensors, "output_blocks"):
        raise UserError(f"{tensors.path} is no classifier but a whole U-Net: open_model reads it")
    options = adm_parts.encoder_options(tensors, int(o["blocks"])) | _heads(tensors, o)
    shape = (o["image_size"], o["image_size"], tensors.shapes["input_blocks.0.0.weight"][1])
    network = encoder(shape, **options)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    params = weights.load(classifier_entries(options, new_attention_order=new_attention_order), tensors, shapes)
    return Classifier(network, params, shape, options, tuple(notes))


def _with_preset(
    tensors: Tensors,
    preset: str,
    given: dict[str, Any],
    presets: Mapping[str, Mapping[str, Any]],
    defaults: Mapping[str, Any],
) -> tuple[dict[str, Any], list[str]]:
    """What was given, else what the preset says. A preset is taken from the file's name if nothing else is said."""
    notes = []
    said = {k: v for k, v in given.items() if v and v != defaults.get(k)}
    name = preset.removesuffix(".pt")
    if name:
        choose("preset", name, presets)
    elif not said and tensors.path.stem in presets:
        name = tensors.path.stem
        notes.append(f"the published flags of {name} were assumed, from the file's name")
    options = {**given, **presets.get(name, {}), **said}
    if not options["image_size"]:
        raise UserError(
            f"{tensors.path}: nothing in it tells the size of its images: give image_size=..., or preset= one of "
            f"{', '.join(presets)}"
        )
    return options, notes


def _heads(tensors: Tensors, o: Mapping[str, Any]) -> dict[str, int]:
    if bool(o["heads"]) == bool(o["head_channels"]):
        raise UserError(
            f"{tensors.path}: nothing in it tells the heads of its attention: give heads=... (num_heads) or "
            "head_channels=... (num_head_channels), one of the two"
        )
    return {"heads": int(o["heads"] or 1), "head_channels": int(o["head_channels"])}


def _channels(tensors: Tensors) -> tuple[int, bool, bool]:
    """(of the images, whether the variance is learned, whether a low-resolution image comes in beside them)."""
    cin, cout = tensors.shapes["input_blocks.0.0.weight"][1], tensors.shapes["out.2.weight"][0]
    if (cin, cout) == (6, 6):  # RGB beside RGB
        return 3, True, True
    if cout in (cin, 2 * cin):
        return cin, cout == 2 * cin, False
    if cin == 2 * cout:
        return cout, False, True
    raise UserError(
        f"{tensors.path}: {cin} channels come in and {cout} go out: as many, twice as many for a learned variance, "
        "or half as many for super-resolution can be read"
    )


# What the original's code cannot be told.
FIXED = {"activation": "silu", "middle": "attention", "middle_norm_groups": 0, "middle_scale": 1.0, "patch": 1,
         "time_embedding": "sinusoidal", "time_scale": 1.0, "frequency_shift": 0.0, "sine_first": False,
         "center_input": False, "norm_eps": 1e-5}  # fmt: skip


def write(architecture: Architecture, params: Any, *, new_attention_order: bool = False) -> dict[str, np.ndarray]:
    """The state dict of guided-diffusion's UNetModel (SuperResModel, if it is conditioned on an image) from ours.
    Raises UserError, one that lists every option that it has not."""
    o = unet_parts.options(unet, architecture.model)
    widths = level_widths(o["channels"], o["multipliers"])
    norms = {w for part in unet_parts.parts(o) for w in (part.cin, part.cout)}
    problems = [f"{name}={o[name]!r}" for name, value in FIXED.items() if o[name] != value]
    if o["embedding_channels"] not in (0, 4 * o["channels"]):
        problems.append(f"embedding_channels={o['embedding_channels']}")
    if (o["stem_channels"] or o["channels"]) != widths[0]:
        problems.append(f"stem_channels={o['stem_channels']} beside a first level of {widths[0]}")
    if architecture.num_classes and o["null_label"]:
        problems.append("null_label=True")
    convolves = o["resample_conv"] and not o["resblock_updown"] and len(widths) > 1
    if convolves and tuple(o["downsample_padding"]) != (1, 1):
        problems.append(f"downsample_padding={tuple(o['downsample_padding'])}")
    if any(layers.group_count(w, o["norm_groups"]) != 32 for w in norms):
        problems.append(f"norm_groups={o['norm_groups']} on {sorted(norms)} channels (it has 32 groups)")
    if problems:
        raise UserError(f"guided-diffusion's UNetModel has no {'; no '.join(problems)}")
    return weights.save(entries(architecture, new_attention_order=new_attention_order), params)
