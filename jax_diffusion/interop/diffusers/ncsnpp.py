"""diffusers' UNet2DModel as `song_unet`, for the blocks of NCSN++ (google/ncsnpp-*; Song et al. 2021).

    SkipDownBlock2D AttnSkipDownBlock2D   UNetMidBlock2D   SkipUpBlock2D AttnSkipUpBlock2D

The published ones were trained on images in [0, 1] and their pipelines sample those; `in_our_range` says so.
"""

import math
from collections.abc import Mapping
from typing import Any

from jax_diffusion import config as configs
from jax_diffusion.errors import UserError
from jax_diffusion.interop.diffusers.unet_weights import (
    DEFAULTS,
    OURS,
    attention,
    forbidden_values,
    ignore,
    image_size,
    rename,
    resblock,
    unknown_fields,
)
from jax_diffusion.interop.imported import Architecture
from jax_diffusion.interop.weights import CONV, Entry, affine, norm
from jax_diffusion.models.resnet import level_widths, multipliers_of

__all__ = ["architecture", "config_of", "entries", "ignore", "in_our_range", "is_ncsnpp", "rename"]

ATTENDS = {"SkipDownBlock2D": False, "AttnSkipDownBlock2D": True, "SkipUpBlock2D": False, "AttnSkipUpBlock2D": True}
ONLY = {
    "in_channels": (3,), "out_channels": (3,), "time_embedding_type": ("fourier",), "act_fn": ("silu", "swish"),
    "mid_block_type": ("UNetMidBlock2D",), "norm_eps": (1e-6,), "resnet_time_scale_shift": ("default",),
    "add_attention": (True,), "class_embed_type": (None,), "num_class_embeds": (None, 0),
}  # fmt: skip


def is_ncsnpp(config: Mapping[str, Any]) -> bool:
    """Whether a config of UNet2DModel is for this module."""
    return any("Skip" in str(t) for way in ("down", "up") for t in config.get(f"{way}_block_types") or ())


def _groups(width: int) -> int:
    return min(width // 4, 32)


def architecture(config: Mapping[str, Any]) -> Architecture:
    """UNet2DModel's config in our terms. UserError that lists every field and block without an equivalent."""
    none = {"down_block_types": (), "up_block_types": ()}
    c = DEFAULTS | none | {name: value for name, value in config.items() if name in DEFAULTS}
    down, up, widths = (tuple(c[name]) for name in ("down_block_types", "up_block_types", "block_out_channels"))
    other = sorted({str(t) for t in (*down, *up) if t not in ATTENDS})
    if other:
        raise UserError(f"{', '.join(other)} beside NCSN++'s blocks have no equivalent here: use {', '.join(ATTENDS)}")
    if not len(down) == len(up) == len(widths) > 0:
        raise UserError("down_block_types, up_block_types and block_out_channels differ in length")
    levels = [[l for l, t in enumerate(types) if ATTENDS[t]] for types in (down, up[::-1])]
    problems = unknown_fields(config) + forbidden_values(c, ONLY)
    if levels[0] != levels[1]:
        problems.append(f"attention at levels {levels[0]} on the way down and {levels[1]} on the way up")
    if not math.isclose(c["mid_block_scale_factor"], math.sqrt(2), abs_tol=1e-6):
        problems.append(f"mid_block_scale_factor={c['mid_block_scale_factor']}, where sqrt(2) can be read")
    for name, at in (("norm_num_groups", (widths[0], widths[-1])), ("attn_norm_num_groups", (widths[-1],))):
        if c[name] is not None and any(c[name] != _groups(w) for w in at):
            said = " and ".join(str(g) for g in sorted({_groups(w) for w in at}))
            problems.append(f"{name}={c[name]}, where {said} (channels / 4, at most 32) or null can be read")
    head = c["attention_head_dim"]
    for width in sorted({*(widths[l] for l in levels[0]), widths[-1]}):
        if head and width % head:
            problems.append(f"attention_head_dim={head} does not divide the {width} channels of a level that attends")
    embedding = c["time_embedding_dim"] or 4 * widths[0]
    if embedding % widths[0]:
        problems.append(f"time_embedding_dim={embedding}, where a multiple of {widths[0]} can be read")
    size = image_size(c, problems)
    if problems:
        raise UserError(f"this UNet2DModel is no NCSN++ that can be built here: {'; '.join(problems)}")
    model = configs.network("song_unet").to_dict() | {
        "channels": widths[0],
        "multipliers": multipliers_of(widths, widths[0]),
        "blocks": c["layers_per_block"],
        "attention_levels": tuple(levels[0]),
        "head_channels": head or 0,
        "dropout": float(c["dropout"]),
        "time_embedding": "log_fourier",
        "noise_width": 2,
        "embedding_width": embedding // widths[0],
        "encoder": "skip",
        "decoder": "skip",
        "resample_filter": (1, 3, 3, 1),
        "center_input": bool(c["center_input_sample"]),
        "unit_range": bool((config.get(OURS) or {}).get("unit_range")),
        "group_rule": "diffusers",
    }
    return Architecture(model, (*size, 3))


def in_our_range(a: Architecture, process: Mapping[str, Any]) -> tuple[Architecture, dict[str, Any]]:
    """(architecture, fields of config.process) of a score model of images in [0, 1], for ours in [-1, 1].

    With x' = 2x - 1 the noise is twice as large, sigma' = 2 sigma, and the score half: -eps / sigma'. Langevin steps,
    sized by a ratio of norms, are the same.
    """
    schedule = configs.named(**process["schedule"].to_dict())
    schedule.update(sigma_min=2 * schedule.sigma_min, sigma_max=2 * schedule.sigma_max)
    return a._replace(model={**a.model, "unit_range": True}), {**process, "schedule": schedule}


def config_of(a: Architecture) -> dict[str, Any]:
    """The config.json of UNet2DModel; UserError that lists the options it has no equivalent of."""
    o = configs.network("song_unet").to_dict() | a.model
    widths = level_widths(o["channels"], o["multipliers"])
    needed = {"time_embedding": "log_fourier", "time_scale": 1.0, "noise_width": 2, "encoder": "skip",
              "decoder": "skip", "resample_filter": (1, 3, 3, 1), "augment_dim": 0, "cond_channels": 0,
              "uncertainty": 0}  # fmt: skip
    odd = [f"{name}={o[name]!r} (there {value!r})" for name, value in needed.items() if o[name] != value]
    attending = {widths[l] for l in o["attention_levels"]}
    if o["group_rule"] != "diffusers" and any(_groups(w) != 32 for w in attending):
        odd.append(f"group_rule={o['group_rule']!r} at {min(attending)} channels (there 'diffusers')")
    if len({w // o["heads"] for w in (*attending, widths[-1])}) > 1 and o["heads"] > 1 and not o["head_channels"]:
        odd.append(f"heads={o['heads']} of different widths (use head_channels)")
    if widths[0] != o["channels"]:
        odd.append(f"a first level of {widths[0]} channels beside channels={o['channels']}")
    if a.num_classes or a.learn_variance or a.shape[-1] != 3:
        odd.append(f"{a.num_classes} classes, learn_variance={a.learn_variance}, {a.shape[-1]} channels (0, False, 3)")
    if odd:
        raise UserError(f"diffusers' NCSN++ has no equivalent of {', '.join(odd)}")
    attends = [l in o["attention_levels"] for l in range(len(widths))]
    one_head = o["heads"] == 1 and not o["head_channels"]
    return {
        "_class_name": "UNet2DModel",
        OURS: {"unit_range": o["unit_range"]},
        "sample_size": a.shape[0] if a.shape[0] == a.shape[1] else list(a.shape[:2]),
        "in_channels": 3,
        "out_channels": 3,
        "center_input_sample": o["center_input"],
        "time_embedding_type": "fourier",
        "time_embedding_dim": o["embedding_width"] * o["channels"],
        "down_block_types": ["AttnSkipDownBlock2D" if y else "SkipDownBlock2D" for y in attends],
        "mid_block_type": "UNetMidBlock2D",
        "up_block_types": ["AttnSkipUpBlock2D" if y else "SkipUpBlock2D" for y in reversed(attends)],
        "block_out_channels": list(widths),
        "layers_per_block": o["blocks"],
        "mid_block_scale_factor": math.sqrt(2),
        "dropout": o["dropout"],
        "act_fn": "silu",
        "attention_head_dim": None if one_head else o["head_channels"] or widths[-1] // o["heads"],
        "norm_num_groups": None,
        "attn_norm_num_groups": None,
        "norm_eps": 1e-6,
        "resnet_time_scale_shift": "default",
        "add_attention": True,
    }


def entries(a: Architecture) -> list[Entry]:
    o = configs.network("song_unet").to_dict() | a.model
    widths, blocks = level_widths(o["channels"], o["multipliers"]), o["blocks"]
    out = [
        Entry("fourier/frequencies", ("time_proj.weight",)),
        *affine("time1", "time_embedding.linear_1"),
        *affine("time2", "time_embedding.linear_2"),
        *affine("stem", "conv_in", CONV),
    ]
    last, before = len(widths) - 1, o["channels"]
    for level, width in enumerate(widths):
        home = f"down_blocks.{level}"
        for i in range(blocks):
            ours = f"down/{level * blocks + i}"
            out += resblock(ours, f"{home}.resnets.{i}", before != width)
            out += attention(f"{ours}/attention", f"{home}.attentions.{i}") if level in o["attention_levels"] else []
            before = width
        if level < last:
            out += resblock(f"shrink/{level}", f"{home}.resnet_down", True)
            out += affine(f"inputs/{level}", f"{home}.skip_conv", CONV)
    out += resblock("middle/0", "mid_block.resnets.0", False) + attention(
        "middle/0/attention", "mid_block.attentions.0"
    )
    out += resblock("middle/1", "mid_block.resnets.1", False)
    for turn, level in enumerate(reversed(range(len(widths)))):
        home = f"up_blocks.{turn}"
        for i in range(blocks + 1):
            out += resblock(f"up/{turn * (blocks + 1) + i}", f"{home}.resnets.{i}", True)
        if level in o["attention_levels"]:
            out += attention(f"up/{turn * (blocks + 1) + blocks}/attention", f"{home}.attentions.0")
        if level:
            out += resblock(f"grow/{turn}", f"{home}.resnet_up", True)
        out += norm(f"norms/{turn}", f"{home}.skip_norm" if level else "conv_norm_out")
        out += affine(f"heads/{turn}", f"{home}.skip_conv" if level else "conv_out", CONV)
    return out
