"""guided-diffusion's names: which architecture they tell, and which of our parameters they are.

input_blocks.0          the first convolution
input_blocks.i.0, .1    a residual block, its attention; or a change of size: .0 a residual block, .0.op, or nothing
middle_block.0, .1, .2  block, attention, block
output_blocks.i.0, ...  block, attention where there is, and after the last of a level .1 or .2 its change of size
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jax_diffusion.errors import UserError
from jax_diffusion.interop import unet_parts
from jax_diffusion.interop.imported import Architecture
from jax_diffusion.interop.tensors import Tensors
from jax_diffusion.interop.unet_parts import Part
from jax_diffusion.interop.weights import AS_IS, CONV, CONV1, CONV1X1, DENSE, Entry, Layout, affine, norm
from jax_diffusion.models import unet
from jax_diffusion.models.encoder import encoder
from jax_diffusion.models.resnet import multipliers_of


def count(tensors: Tensors, name: str) -> int:
    """How many modules input_blocks or output_blocks have."""
    found = (re.match(rf"{name}\.(\d+)\.", key) for key in tensors)
    return 1 + max((int(m[1]) for m in found if m), default=-1)


def _depth(tensors: Tensors, blocks: int = 0) -> int:
    """Residual blocks a level. blocks: what the user says, 0 nothing. UserError where the names leave it open."""
    inputs = count(tensors, "input_blocks")

    def has(name: str) -> bool:
        return name in tensors.shapes

    for i in range(1, inputs):  # a change of size by a convolution, or by one without parameters
        if has(f"input_blocks.{i}.0.op.weight") or not has(f"input_blocks.{i}.0.in_layers.2.weight"):
            return i - 1
    outputs = count(tensors, "output_blocks")
    for i in range(outputs):
        if any(has(f"output_blocks.{i}.{j}.{kind}.weight") for j in (1, 2) for kind in ("in_layers.2", "conv")):
            return i
    if outputs:
        return inputs - 1  # one level

    def fits(n: int) -> bool:
        """Whether every n+1st block may be a change of size, and those between them a level."""
        if inputs % (n + 1):
            return False
        for start in range(1, inputs, n + 1):
            level = range(start, start + n)
            if (
                len({has(f"input_blocks.{i}.1.qkv.weight") for i in level}) > 1
                or len({_width(tensors, i) for i in level}) > 1
            ):
                return False
            end = start + n
            if end < inputs and (
                has(f"input_blocks.{end}.1.qkv.weight") or has(f"input_blocks.{end}.0.skip_connection.weight")
            ):
                return False
        return True

    found = [n for n in range(1, inputs) if fits(n)]
    if blocks in found:
        return blocks
    if blocks or len(found) != 1:
        raise UserError(
            f"{tensors.path}: its names leave {found} blocks a level possible: give blocks=... (classifier_depth)"
        )
    return found[0]


def _width(tensors: Tensors, i: int) -> int:
    return tensors.shapes[f"input_blocks.{i}.0.in_layers.2.weight"][0]


def _options(tensors: Tensors, blocks: int = 0) -> dict[str, Any]:
    """What `unet` and `encoder` have in common."""
    try:
        channels = tensors.shapes["time_embed.0.weight"][1]
        n = _depth(tensors, blocks)
        levels = count(tensors, "input_blocks") // (n + 1)
        firsts = [1 + level * (n + 1) for level in range(levels)]
        widths = [_width(tensors, i) for i in firsts]
        embed = tensors.shapes["input_blocks.1.0.emb_layers.1.weight"][0]
        changes = [kind for kind in ("in_layers.2", "op") if f"input_blocks.{n + 1}.0.{kind}.weight" in tensors.shapes]
        stem = tensors.shapes["input_blocks.0.0.weight"][0]
    except (KeyError, IndexError) as error:
        raise UserError(f"{tensors.path} is no state dict of guided-diffusion: {error} is missing or odd") from None
    return {
        "channels": channels,
        "multipliers": multipliers_of(widths, channels),
        "stem_channels": 0 if stem == channels else stem,
        "blocks": n,
        "attention_levels": tuple(
            level for level, i in enumerate(firsts) if f"input_blocks.{i}.1.qkv.weight" in tensors.shapes
        ),
        "scale_shift": embed == 2 * widths[0],
        "resblock_updown": "in_layers.2" in changes,
        "resample_conv": bool(changes) or levels == 1,
        "downsample_padding": (1, 1),
        "norm_groups": 32,
        "norm_eps": 1e-5,
    }


def unet_options(tensors: Tensors) -> dict[str, Any]:
    return {"name": "unet", **_options(tensors), "null_label": "label_emb.weight" not in tensors.shapes}


def encoder_options(tensors: Tensors, blocks: int) -> dict[str, Any]:
    options = _options(tensors, blocks)
    for pool, last in (("attention", "out.2.c_proj"), ("adaptive", "out.3"), ("spatial", "out.2")):
        if f"{last}.weight" in tensors.shapes:
            # A matrix, where the adaptive pool has a 1x1 convolution.
            if pool == "adaptive" and len(tensors.shapes["out.3.weight"]) == 2:
                pool = "spatial_v2"
            classes = tensors.shapes[f"{last}.weight"][0]
            return options | {"pool": pool, "num_classes": classes}
    raise UserError(f"{tensors.path}: its pool (out.*) is none of guided-diffusion's")


def _per_head(layout: Layout, heads: int) -> Layout:
    """QKVAttentionLegacy: q, k and v of the first head, then of the second; ours is all of q, then k, then v."""

    def swapped(a: np.ndarray, outer: int, inner: int) -> np.ndarray:
        return a.reshape(*a.shape[:-1], outer, inner, -1).swapaxes(-3, -2).reshape(a.shape)

    return Layout(
        lambda arrays: swapped(layout.to_ours(arrays), heads, 3),
        lambda array: layout.to_theirs(swapped(array, 3, heads)),
    )


def entries(architecture: Architecture, *, new_attention_order: bool = False) -> list[Entry]:
    """Of UNetModel and SuperResModel."""
    o = unet_parts.options(unet, architecture.model)
    out = [
        *_ends(),
        *norm("norm", "out.0"),
        *affine("head", "out.2", CONV),
        *(entry for part in unet_parts.parts(o) for entry in _part(part, o, new_attention_order)),
    ]
    if architecture.num_classes:
        out.append(Entry("label/embedding", ("label_emb.weight",)))
    return out


def classifier_entries(options: Mapping[str, Any], *, new_attention_order: bool = False) -> list[Entry]:
    """Of EncoderUNetModel."""
    o = unet_parts.options(encoder, options) | {"middle": "attention"}
    out = _ends()
    for part in (*unet_parts.down(o), *unet_parts.middle(o)):
        out += _part(part, o, new_attention_order)
    if o["pool"] == "attention":
        return [
            *out,
            *norm("norm", "out.0"),
            Entry("out/position", ("out.2.positional_embedding",), DENSE),
            *affine("out/qkv", "out.2.qkv_proj", CONV1),
            *affine("out/out", "out.2.c_proj", CONV1),
        ]
    if o["pool"] == "adaptive":
        return [*out, *norm("norm", "out.0"), *affine("out", "out.3", CONV1X1)]
    out += affine("hidden", "out.0")
    if o["pool"] == "spatial":
        return out + affine("out", "out.2")
    return [*out, *norm("norm", "out.1"), *affine("out", "out.3")]


def _ends() -> list[Entry]:
    return [
        *affine("stem", "input_blocks.0.0", CONV),
        *affine("time1", "time_embed.0"),
        *affine("time2", "time_embed.2"),
    ]


def _part(part: Part, o: Mapping[str, Any], new_attention_order: bool) -> list[Entry]:
    row = int(part.ours.split("/")[1])
    if part.way == "middle":
        home = f"middle_block.{2 * row}"
        attention = "middle_block.1"
    elif part.way in ("up", "grow"):
        # A change of size is the last module of its level's last block.
        i = row if part.way == "up" else (row + 1) * (o["blocks"] + 1) - 1
        last = 2 if part.level in o["attention_levels"] else 1
        home, attention = f"output_blocks.{i}.{last if part.way == 'grow' else 0}", f"output_blocks.{i}.1"
    else:
        home, attention = f"input_blocks.{row + 1}.0", f"input_blocks.{row + 1}.1"
    if part.way in ("shrink", "grow") and not o["resblock_updown"]:
        name = "op" if part.way == "shrink" else "conv"
        return affine(f"{part.ours}/conv", f"{home}.{name}", CONV) if o["resample_conv"] else []
    ours = f"{part.ours}/block"
    out = [
        *norm(f"{ours}/norm1", f"{home}.in_layers.0"),
        *affine(f"{ours}/conv1", f"{home}.in_layers.2", CONV),
        *affine(f"{ours}/embed", f"{home}.emb_layers.1"),
        *norm(f"{ours}/norm2", f"{home}.out_layers.0"),
        *affine(f"{ours}/conv2", f"{home}.out_layers.3", CONV),
        *(affine(f"{ours}/shortcut", f"{home}.skip_connection", CONV) if part.shortcut else ()),
    ]
    if not part.attends:
        return out
    ours, heads = f"{part.ours}/attention", part.cout // o["head_channels"] if o["head_channels"] else o["heads"]
    kernel, bias = (l if new_attention_order else _per_head(l, heads) for l in (CONV1, AS_IS))
    return [
        *out,
        *norm(f"{ours}/norm", f"{attention}.norm"),
        Entry(f"{ours}/qkv/kernel", (f"{attention}.qkv.weight",), kernel),
        Entry(f"{ours}/qkv/bias", (f"{attention}.qkv.bias",), bias),
        *affine(f"{ours}/out", f"{attention}.proj_out", CONV1),
    ]
