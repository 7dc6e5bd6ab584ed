"""Which tensors of UNet2DModel the parameters of `unet` are."""

import re
from collections.abc import Mapping
from typing import Any

from jax_diffusion.interop import unet_parts
from jax_diffusion.interop.imported import Architecture
from jax_diffusion.interop.unet_parts import Part
from jax_diffusion.interop.weights import AS_IS, CONV, DENSE, Entry, Layout, affine, joined, norm
from jax_diffusion.models import unet

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
        return _resblock(part, home) if o["resblock_updown"] else affine(f"{part.ours}/conv", f"{home}.conv", CONV)
    out = _resblock(part, f"{home}resnets.{part.index}")
    if part.attends:
        ours, theirs = f"{part.ours}/attention", f"{home}attentions.{part.index}"
        normed = part.way != "middle" or o["middle_norm_groups"] >= 0
        qkv = [f"{theirs}.to_{letter}" for letter in "qkv"]
        out += [
            *(norm(f"{ours}/norm", f"{theirs}.group_norm") if normed else ()),
            Entry(f"{ours}/qkv/kernel", tuple(f"{name}.weight" for name in qkv), joined(MATRIX, 3)),
            Entry(f"{ours}/qkv/bias", tuple(f"{name}.bias" for name in qkv), joined(AS_IS, 3)),
            *affine(f"{ours}/out", f"{theirs}.to_out.0", MATRIX),
        ]
    return out


def _resblock(part: Part, theirs: str) -> list[Entry]:
    ours = f"{part.ours}/block"
    return [
        *norm(f"{ours}/norm1", f"{theirs}.norm1"),
        *affine(f"{ours}/conv1", f"{theirs}.conv1", CONV),
        *affine(f"{ours}/embed", f"{theirs}.time_emb_proj"),
        *norm(f"{ours}/norm2", f"{theirs}.norm2"),
        *affine(f"{ours}/conv2", f"{theirs}.conv2", CONV),
        *(affine(f"{ours}/shortcut", f"{theirs}.conv_shortcut", CONV) if part.shortcut else ()),
    ]


OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def rename(name: str) -> str:
    """Names of diffusers before 0.13, and of the Fourier frequencies before theirs."""
    name = re.sub(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.", lambda m: f"{m[1]}.{OLD[m[2]]}.", name)
    return "time_proj.weight" if name == "time_proj.W" else name


def ignore(name: str) -> bool:
    return False
