"""diffusers' UNet2DModel as `song_unet`, for the blocks of NCSN++ (google/ncsnpp-*; Song et al. 2021).

    SkipDownBlock2D AttnSkipDownBlock2D   UNetMidBlock2D   SkipUpBlock2D AttnSkipUpBlock2D

The published ones were trained on images in [0, 1] and their pipelines sample those; `in_our_range` says so.
"""

import math
from collections.abc import Mapping
from typing import Any

from jax_diffusion import config as configs
from jax_diffusion.errors import UserError
from jax_diffusion.interop.diffusers.unet_weights import MATRIX, rename
from jax_diffusion.interop.imported import Architecture
from jax_diffusion.interop.weights import AS_IS, CONV, Entry, affine, joined, norm
from jax_diffusion.models.resnet import level_widths

__all__ = ["architecture", "config_of", "entries", "ignore", "in_our_range", "is_ncsnpp", "rename"]

OURS = "_jax_diffusion"  # what diffusers has no field for
ATTENDS = {"SkipDownBlock2D": False, "AttnSkipDownBlock2D": True, "SkipUpBlock2D": False, "AttnSkipUpBlock2D": True}
# What UNet2DModel takes a field for that a config leaves out, and all that it may say here; None: see `architecture`.
DEFAULTS = {
    "sample_size": None, "in_channels": 3, "out_channels": 3, "center_input_sample": False,
    "time_embedding_type": "positional", "time_embedding_dim": None, "freq_shift": 0, "flip_sin_to_cos": True,
    "down_block_types": (), "mid_block_type": "UNetMidBlock2D", "up_block_types": (),
    "block_out_channels": (224, 448, 672, 896), "layers_per_block": 2, "mid_block_scale_factor": 1,
    "downsample_padding": 1, "downsample_type": "conv", "upsample_type": "conv", "dropout": 0.0, "act_fn": "silu",
    "attention_head_dim": 8, "norm_num_groups": 32, "attn_norm_num_groups": None, "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default", "add_attention": True, "class_embed_type": None, "num_class_embeds": None,
    "num_train_timesteps": None,
}  # fmt: skip
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
    c = DEFAULTS | {name: value for name, value in config.items() if name in DEFAULTS}
    down, up, widths = (tuple(c[name]) for name in ("down_block_types", "up_block_types", "block_out_channels"))
    other = sorted({str(t) for t in (*down, *up) if t not in ATTENDS})
    if other:
        raise UserError(f"{', '.join(other)} beside NCSN++'s blocks have no equivalent here: use {', '.join(ATTENDS)}")
    if not len(down) == len(up) == len(widths) > 0:
        raise UserError("down_block_types, up_block_types and block_out_channels differ in length")
    levels = [[l for l, t in enumerate(types) if ATTENDS[t]] for types in (down, up[::-1])]
    problems = [
        f"{name}={value!r} is a field that is not known here (remove it if it says nothing of the network)"
        for name, value in config.items()
        if name not in DEFAULTS and not name.startswith("_") and value not in (None, False)
    ]
    problems += [
        f"{n}={c[n]!r}, where {' or '.join(map(repr, v))} can be read" for n, v in ONLY.items() if c[n] not in v
    ]
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
    size = (c["sample_size"],) * 2 if isinstance(c["sample_size"], int) else tuple(c["sample_size"] or ())
    if len(size) != 2:
        problems.append(f"sample_size={c['sample_size']!r}: write the images' size [height, width] into config.json")
    if problems:
        raise UserError(f"this UNet2DModel is no NCSN++ that can be built here: {'; '.join(problems)}")
    model = configs.network("song_unet").to_dict() | {
        "channels": widths[0],
        "multipliers": tuple(w // widths[0] if w % widths[0] == 0 else w / widths[0] for w in widths),
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
            out += _resblock(ours, f"{home}.resnets.{i}", before != width)
            out += _attention(ours, f"{home}.attentions.{i}") if level in o["attention_levels"] else []
            before = width
        if level < last:
            out += _resblock(f"shrink/{level}", f"{home}.resnet_down", True)
            out += affine(f"inputs/{level}", f"{home}.skip_conv", CONV)
    out += _resblock("middle/0", "mid_block.resnets.0", False) + _attention("middle/0", "mid_block.attentions.0")
    out += _resblock("middle/1", "mid_block.resnets.1", False)
    for turn, level in enumerate(reversed(range(len(widths)))):
        home = f"up_blocks.{turn}"
        for i in range(blocks + 1):
            out += _resblock(f"up/{turn * (blocks + 1) + i}", f"{home}.resnets.{i}", True)
        if level in o["attention_levels"]:
            out += _attention(f"up/{turn * (blocks + 1) + blocks}", f"{home}.attentions.0")
        if level:
            out += _resblock(f"grow/{turn}", f"{home}.resnet_up", True)
        out += norm(f"norms/{turn}", f"{home}.skip_norm" if level else "conv_norm_out")
        out += affine(f"heads/{turn}", f"{home}.skip_conv" if level else "conv_out", CONV)
    return out


def _resblock(ours: str, theirs: str, shortcut: bool) -> list[Entry]:
    return [
        *norm(f"{ours}/norm1", f"{theirs}.norm1"),
        *affine(f"{ours}/conv1", f"{theirs}.conv1", CONV),
        *affine(f"{ours}/embed", f"{theirs}.time_emb_proj"),
        *norm(f"{ours}/norm2", f"{theirs}.norm2"),
        *affine(f"{ours}/conv2", f"{theirs}.conv2", CONV),
        *(affine(f"{ours}/shortcut", f"{theirs}.conv_shortcut", CONV) if shortcut else ()),
    ]


def _attention(ours: str, theirs: str) -> list[Entry]:
    ours, qkv = f"{ours}/attention", [f"{theirs}.to_{letter}" for letter in "qkv"]
    return [
        *norm(f"{ours}/norm", f"{theirs}.group_norm"),
        Entry(f"{ours}/qkv/kernel", tuple(f"{name}.weight" for name in qkv), joined(MATRIX, 3)),
        Entry(f"{ours}/qkv/bias", tuple(f"{name}.bias" for name in qkv), joined(AS_IS, 3)),
        *affine(f"{ours}/out", f"{theirs}.to_out.0", MATRIX),
    ]


def ignore(name: str) -> bool:
    return False
