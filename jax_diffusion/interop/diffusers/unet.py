"""diffusers' UNet2DModel as `unet`, for the blocks of DDPM and ADM.

    DownBlock2D AttnDownBlock2D ResnetDownsampleBlock2D   UNetMidBlock2D or none
    UpBlock2D   AttnUpBlock2D   ResnetUpsampleBlock2D

Its table of classes has no row known to mean "no label": num_class_embeds are num_classes, unless `_jax_diffusion` in
the config (which diffusers passes over) says that the file is one of ours.
"""

from collections.abc import Mapping
from typing import Any

from jax_diffusion.errors import UserError
from jax_diffusion.interop import unet_parts
from jax_diffusion.interop.diffusers import ncsnpp, unet_weights
from jax_diffusion.interop.diffusers.unet_weights import DEFAULTS, OURS, ignore, rename
from jax_diffusion.interop.imported import Architecture
from jax_diffusion.interop.weights import Entry
from jax_diffusion.models import layers, unet
from jax_diffusion.models.resnet import ACTIVATIONS, level_widths, multipliers_of

__all__ = ["architecture", "config_of", "entries", "ignore", "rename"]

ATTENDS = {"DownBlock2D": False, "AttnDownBlock2D": True, "ResnetDownsampleBlock2D": False,
           "UpBlock2D": False, "AttnUpBlock2D": True, "ResnetUpsampleBlock2D": False}  # fmt: skip
TIME = {"positional": "sinusoidal", "fourier": "log_fourier"}
# fields that may hold but these values, others than which `unet` has no equivalent of
ONLY = {
    "time_embedding_type": tuple(TIME),
    "mid_block_type": ("UNetMidBlock2D", None),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
    "act_fn": ("swish", *ACTIVATIONS),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None,),
}


def architecture(config: Mapping[str, Any]) -> Architecture:
    """UNet2DModel's config in our terms. UserError that lists every field without an equivalent."""
    if ncsnpp.is_ncsnpp(config):
        return ncsnpp.architecture(config)
    c = DEFAULTS | {name: value for name, value in config.items() if name in DEFAULTS}
    types = [[str(t).removeprefix("UNetRes") for t in c[f"{way}_block_types"]] for way in ("down", "up")]
    _check_blocks(c, *types)
    ours = config.get(OURS) or {}
    problems = unet_weights.unknown_fields(config) + unet_weights.forbidden_values(c, ONLY)
    problems += [
        f"{name}={c[name]!r}, where a number is needed"
        for name in ("layers_per_block", "norm_num_groups")
        if not isinstance(c[name], int)
    ]
    size = unet_weights.image_size(c, problems)
    image_channels, learn_variance = _channels(c, ours, problems)
    attention_levels, resblock_updown = _levels(c, types[0], types[1], problems)

    widths, head, middle = tuple(c["block_out_channels"]), c["attention_head_dim"], "none"
    if c["mid_block_type"]:
        middle = "attention" if c["add_attention"] else "blocks"
    attending = [widths[l] for l in attention_levels] + [widths[-1]] * (middle == "attention")
    problems += [
        f"attention_head_dim={head}, which does not divide the {width} channels of a level that attends"
        for width in sorted({w for w in attending if head and w % head})
    ]
    if problems:
        raise UserError(f"this UNet2DModel is no network that can be built here: {'; '.join(problems)}")

    scale_shift = c["resnet_time_scale_shift"] == "scale_shift"
    middle_groups = c["attn_norm_num_groups"] or (-1 if scale_shift else 0)  # none of its own: none at all
    classes, null_label = c["num_class_embeds"] or 0, bool(c["num_class_embeds"] and ours.get("null_label"))
    model = {
        "name": "unet",
        "channels": widths[0],
        "multipliers": multipliers_of(widths, widths[0]),
        "stem_channels": 0,
        "blocks": c["layers_per_block"],
        "attention_levels": attention_levels,
        "heads": 1,
        "head_channels": (head or 0) if attending else 0,
        "dropout": float(c["dropout"]),
        "activation": "silu" if c["act_fn"] == "swish" else c["act_fn"],
        "scale_shift": scale_shift,
        "resblock_updown": resblock_updown,
        "resample_conv": True,
        "downsample_padding": (1, 1) if c["downsample_padding"] else (0, 1),
        "middle": middle,
        "middle_norm_groups": 0 if middle_groups == c["norm_num_groups"] else middle_groups,
        "middle_scale": float(c["mid_block_scale_factor"]),
        "time_embedding": TIME[c["time_embedding_type"]],
        "embedding_channels": c["time_embedding_dim"] or 0,
        "frequency_shift": float(c["freq_shift"]),
        # diffusers' Fourier features are sine first whatever flip_sin_to_cos says
        "sine_first": c["time_embedding_type"] == "fourier" or not c["flip_sin_to_cos"],
        "center_input": bool(c["center_input_sample"]),
        "null_label": null_label or not classes,
        "cond_channels": c["in_channels"] - image_channels,
        "patch": 1,
        "norm_groups": c["norm_num_groups"],
        "norm_eps": float(c["norm_eps"]),
    }
    return Architecture(
        model,
        (*size, image_channels),
        classes - null_label,
        learn_variance,
        model["cond_channels"],
    )


def _check_blocks(c: Mapping[str, Any], down: list[str], up: list[str]) -> None:
    unknown = [t for t in down if t not in ATTENDS or t.endswith("UpBlock2D")]
    unknown += [t for t in up if t not in ATTENDS or t.endswith("DownBlock2D")]
    if unknown:
        raise UserError(f"{', '.join(unknown)} have no equivalent here: {', '.join(ATTENDS)} have")
    if not len(down) == len(up) == len(c["block_out_channels"]):
        raise UserError("down_block_types, up_block_types and block_out_channels differ in length")


def _channels(c: Mapping[str, Any], ours: Mapping[str, Any], problems: list[str]) -> tuple[int, bool]:
    """(of the images, whether the variance is learned). What comes in beside an image is a condition."""
    cin, cout = c["in_channels"], c["out_channels"]
    if "image_channels" in ours:
        return ours["image_channels"], cout == 2 * ours["image_channels"]
    if cout == 2 * cin:
        return cin, True
    if cout > cin:
        problems.append(f"out_channels={cout} of in_channels={cin}, where as many or twice as many can be read")
    return cout, False


def _levels(c: Mapping[str, Any], down: list[str], up: list[str], problems: list[str]) -> tuple[tuple[int, ...], bool]:
    """(the levels that attend, whether the size changes inside residual blocks)."""
    up = up[::-1]
    attention = [[l for l, t in enumerate(types) if ATTENDS[t]] for types in (down, up)]
    if attention[0] != attention[1]:
        problems.append(f"attention at levels {attention[0]} on the way down and {attention[1]} on the way up")
    # The last block down and the first level's block up change no size.
    changing = [(t, c["downsample_type"]) for t in down[:-1]] + [(t, c["upsample_type"]) for t in up[1:]]
    inside = {kind == "resnet" if ATTENDS[t] else t.startswith("Resnet") for t, kind in changing}
    if len(inside) > 1:
        problems.append(
            "some changes of size inside residual blocks and others by a convolution (downsample_type="
            f"{c['downsample_type']!r}, upsample_type={c['upsample_type']!r}, {', '.join(sorted({*down, *up}))})"
        )
    return tuple(attention[0]), inside == {True}


def entries(a: Architecture) -> list[Entry]:
    return (ncsnpp if a.model["name"] == "song_unet" else unet_weights).entries(a)


def config_of(a: Architecture) -> dict[str, Any]:
    """The config.json of UNet2DModel; UserError that lists the options it has no equivalent of."""
    if a.model["name"] == "song_unet":
        return ncsnpp.config_of(a)
    o = unet_parts.options(unet, a.model)
    widths = level_widths(o["channels"], o["multipliers"])
    inside, fourier = o["resblock_updown"], o["time_embedding"] == "log_fourier"
    padding = {(0, 1): 0, (1, 1): 1}.get(tuple(o["downsample_padding"]), None if len(widths) > 1 and not inside else 0)
    parts = unet_parts.parts(o)
    norms = {widths[0], *(w for p in parts for w in (p.cin, p.cout) if p.way not in ("shrink", "grow") or inside)}
    groups = {layers.group_count(w, o["norm_groups"]) for w in norms}
    attending = {p.cout for p in parts if p.attends}
    head_dims = {o["head_channels"] or w // o["heads"] for w in attending}
    own = o["heads"] == 1 and not o["head_channels"]  # one head, whatever the width
    middle_groups = layers.group_count(widths[-1], max(o["middle_norm_groups"], 0) or o["norm_groups"])
    unnormed = o["middle"] == "attention" and o["middle_norm_groups"] < 0
    problems = {
        f"patch={o['patch']}": o["patch"] != 1,
        f"time_scale={o['time_scale']}": o["time_scale"] != 1,
        f"time_embedding={o['time_embedding']!r}": o["time_embedding"] not in TIME.values(),
        f"sine_first=False with {o['time_embedding']!r}": fourier and not o["sine_first"],
        f"stem_channels={o['stem_channels']} beside a first level of {widths[0]}": (
            (o["stem_channels"] or o["channels"]) != widths[0]
        ),
        f"channels={o['channels']} (of the time embedding) beside a first level of {widths[0]}": (
            o["channels"] != widths[0]
        ),
        "resample_conv=False": not (o["resample_conv"] or inside),
        f"downsample_padding={tuple(o['downsample_padding'])}": padding is None,
        f"heads={o['heads']} of different widths (use head_channels)": not own and len(head_dims) > 1,
        f"norm_groups={o['norm_groups']}, which makes {sorted(groups)} groups (use a number that divides all of "
        f"{sorted(norms)})": len(groups) > 1,
        "middle_norm_groups=-1 without scale_shift": unnormed and not o["scale_shift"],
    }
    if any(problems.values()):
        raise UserError(f"diffusers' UNet2DModel has no {'; no '.join(p for p, found in problems.items() if found)}")

    def kinds(way: str, plain: str, resnet: str) -> list[str]:
        attends = [l in o["attention_levels"] for l in range(len(widths))]
        return [f"Attn{plain}" if a else resnet if inside else plain for a in attends][:: 1 if way == "down" else -1]

    classes = a.num_classes + (o["null_label"] if a.num_classes else 0)
    return {
        "_class_name": "UNet2DModel",
        OURS: {"null_label": bool(a.num_classes and o["null_label"]), "image_channels": a.shape[-1]},
        "sample_size": a.shape[0] if a.shape[0] == a.shape[1] else list(a.shape[:2]),
        "in_channels": a.shape[-1] + (a.cond_channels or o["cond_channels"]),
        "out_channels": a.shape[-1] * (2 if a.learn_variance else 1),
        "center_input_sample": o["center_input"],
        "time_embedding_type": "fourier" if fourier else "positional",
        "time_embedding_dim": o["embedding_channels"] or None,
        "freq_shift": int(o["frequency_shift"]) if o["frequency_shift"] % 1 == 0 else o["frequency_shift"],
        "flip_sin_to_cos": not o["sine_first"],
        "down_block_types": kinds("down", "DownBlock2D", "ResnetDownsampleBlock2D"),
        "mid_block_type": None if o["middle"] == "none" else "UNetMidBlock2D",
        "up_block_types": kinds("up", "UpBlock2D", "ResnetUpsampleBlock2D"),
        "block_out_channels": list(widths),
        "layers_per_block": o["blocks"],
        "mid_block_scale_factor": o["middle_scale"],
        "downsample_padding": padding,
        "downsample_type": "resnet" if inside else "conv",
        "upsample_type": "resnet" if inside else "conv",
        "dropout": o["dropout"],
        "act_fn": o["activation"],
        "attention_head_dim": None if own or not head_dims else head_dims.pop(),
        "norm_num_groups": groups.pop(),
        "attn_norm_num_groups": None if unnormed else middle_groups,
        "norm_eps": o["norm_eps"],
        "resnet_time_scale_shift": "scale_shift" if o["scale_shift"] else "default",
        "add_attention": o["middle"] != "blocks",
        "class_embed_type": None,
        "num_class_embeds": classes or None,
        "num_train_timesteps": None,
    }
