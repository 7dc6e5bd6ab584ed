"""UNet2DModel: what its readers, as `unet` and as NCSN++, have in common, and which tensors `unet`'s parameters are."""

import re
from collections.abc import Mapping
from typing import Any

from jax_diffusion.interop import unet_parts
from jax_diffusion.interop.imported import Architecture
from jax_diffusion.interop.unet_parts import Part
from jax_diffusion.interop.weights import AS_IS, CONV, DENSE, Entry, Layout, affine, joined, norm
from jax_diffusion.models import unet

OURS = "_jax_diffusion"  # what diffusers has no field for

DEFAULTS = {  # of UNet2DModel: what a config that leaves a field out means
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896),
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}

# Files of old diffusers kept q, k, v and the output as 1x1 convolutions or as matrices.
MATRIX = Layout(lambda arrays: arrays[0].reshape(arrays[0].shape[:2]).T, DENSE.to_theirs)


def entries(a: Architecture) -> list[Entry]:
    o = unet_parts.options(unet, a.model)
    out = [
        *affine("stem", "conv_in", CONV),
        *affine("time1", "time_embedding.linear_1"),
        *affine("time2", "time_embedding.linear_2"),
        *norm("norm", "conv_norm_out"),
        *affine("head", "conv_out", CONV),
    ]
    if o["time_embedding"] == "log_fourier":
        out.append(Entry("fourier/frequencies", ("time_proj.weight",)))
    if a.num_classes:
        out.append(Entry("label/embedding", ("class_embedding.weight",)))
    for part in unet_parts.parts(o):
        out += _part(part, len(o["multipliers"]), o)
    return out


def _part(part: Part, levels: int, o: Mapping[str, Any]) -> list[Entry]:
    home = {
        "down": f"down_blocks.{part.level}.",
        "shrink": f"down_blocks.{part.level}.downsamplers.0",
        "middle": "mid_block.",
        "up": f"up_blocks.{levels - 1 - part.level}.",
        "grow": f"up_blocks.{levels - 1 - part.level}.upsamplers.0",
    }[part.way]
    if part.way in ("shrink", "grow"):
        if o["resblock_updown"]:
            return resblock(f"{part.ours}/block", home, part.shortcut)
        return affine(f"{part.ours}/conv", f"{home}.conv", CONV)
    out = resblock(f"{part.ours}/block", f"{home}resnets.{part.index}", part.shortcut)
    if part.attends:
        normed = part.way != "middle" or o["middle_norm_groups"] >= 0
        out += attention(f"{part.ours}/attention", f"{home}attentions.{part.index}", normed=normed)
    return out


def attention(ours: str, theirs: str, *, normed: bool = True) -> list[Entry]:
    qkv = [f"{theirs}.to_{letter}" for letter in "qkv"]
    return [
        *(norm(f"{ours}/norm", f"{theirs}.group_norm") if normed else ()),
        Entry(f"{ours}/qkv/kernel", tuple(f"{name}.weight" for name in qkv), joined(MATRIX, 3)),
        Entry(f"{ours}/qkv/bias", tuple(f"{name}.bias" for name in qkv), joined(AS_IS, 3)),
        *affine(f"{ours}/out", f"{theirs}.to_out.0", MATRIX),
    ]


def resblock(ours: str, theirs: str, shortcut: bool) -> list[Entry]:
    return [
        *norm(f"{ours}/norm1", f"{theirs}.norm1"),
        *affine(f"{ours}/conv1", f"{theirs}.conv1", CONV),
        *affine(f"{ours}/embed", f"{theirs}.time_emb_proj"),
        *norm(f"{ours}/norm2", f"{theirs}.norm2"),
        *affine(f"{ours}/conv2", f"{theirs}.conv2", CONV),
        *(affine(f"{ours}/shortcut", f"{theirs}.conv_shortcut", CONV) if shortcut else ()),
    ]


OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def unknown_fields(config: Mapping[str, Any]) -> list[str]:
    """A line for each field that is set and that UNet2DModel, as it is known here, does not have."""
    return [
        f"{name}={value!r} is a field that is not known here (remove it if it says nothing of the network)"
        for name, value in config.items()
        if name not in DEFAULTS and not name.startswith("_") and value not in (None, False)
    ]


def forbidden_values(c: Mapping[str, Any], only: Mapping[str, tuple]) -> list[str]:
    """A line for each field that holds none of the values that `only` lists."""
    return [
        f"{name}={c[name]!r}, where {' or '.join(map(repr, known))} can be read"
        for name, known in only.items()
        if c[name] not in known
    ]


def image_size(c: Mapping[str, Any], problems: list[str]) -> tuple[int, ...]:
    """(height, width) of sample_size."""
    size = (c["sample_size"],) * 2 if isinstance(c["sample_size"], int) else tuple(c["sample_size"] or ())
    if len(size) != 2:
        problems.append(f"sample_size={c['sample_size']!r}: write the images' size [height, width] into config.json")
    return size


def rename(name: str) -> str:
    """Names of diffusers before 0.13, and of the Fourier frequencies before theirs."""
    name = re.sub(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.", lambda m: f"{m[1]}.{OLD[m[2]]}.", name)
    return "time_proj.weight" if name == "time_proj.W" else name


def ignore(name: str) -> bool:
    return False
