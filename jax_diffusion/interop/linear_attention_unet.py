"""The Unet of denoising_diffusion_pytorch: its options from names and shapes, and which parameter is which."""

import re
from typing import Any

import numpy as np

from jax_diffusion import config as configs
from jax_diffusion.errors import UserError
from jax_diffusion.interop.imported import Architecture
from jax_diffusion.interop.tensors import Tensors
from jax_diffusion.interop.weights import AS_IS, CONV, CONV1X1, Entry, Layout, affine

NAME = "linear_attention_unet"


def _one(to_ours, to_theirs) -> Layout:
    return Layout(lambda arrays: to_ours(*arrays), lambda array: (to_theirs(array),))


GAIN = _one(lambda a: a[0, :, 0, 0], lambda a: a[None, :, None, None])
# Theirs unfolds pixels channel by channel, ours pixel by pixel.
FOLD = _one(
    lambda a: a.reshape(len(a), -1, 2, 2).transpose(2, 3, 1, 0).reshape(-1, len(a)),
    lambda a: a.reshape(2, 2, -1, a.shape[1]).transpose(3, 2, 0, 1).reshape(a.shape[1], -1, 1, 1),
)
# Learned keys and values, ours [2, M, H, D].
LINEAR_MEMORY = _one(lambda a: a.transpose(0, 3, 1, 2), lambda a: a.transpose(0, 2, 3, 1))
FULL_MEMORY = _one(lambda a: a.transpose(0, 2, 1, 3), lambda a: a.transpose(0, 2, 1, 3))
# The table of labels, and the row of no label, which is theirs apart.
TABLE = Layout(lambda arrays: np.concatenate([arrays[0], arrays[1][None]]), lambda a: (a[:-1], a[-1]))


def _stem(cond_channels: int) -> Layout:
    """Self-conditioning is concatenated before the image, here after it."""
    return _one(
        lambda a: np.roll(CONV.to_ours([a]), -cond_channels, axis=2),
        lambda a: CONV.to_theirs(np.roll(a, cond_channels, axis=2))[0],
    )


def architecture(
    tensors: Tensors, size: tuple[int, int], max_period: float, head_channels: int
) -> tuple[Architecture, list[str]]:
    """The network of a state dict, and what was assumed. UserError where it is none of the package's.

    head_channels: of attention without mem_kv, which says it elsewhere.
    """
    shapes, notes = tensors.shapes, []

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if len(shapes.get(name, ())) != rank:
            found = f"is {list(shapes[name])}" if name in shapes else "is missing"
            raise UserError(f"{tensors.path} holds no Unet of denoising_diffusion_pytorch: {name} {found}")
        return shapes[name]

    if "time_mlp.0.weights" in shapes:
        raise UserError(
            f"{tensors.path}: its time embedding is of Fourier features (time_mlp.0.weights), a network of continuous "
            "time (ContinuousTimeGaussianDiffusion, ElucidatedDiffusion), whose schedule has no equivalent here"
        )
    count = 1 + max((int(m[1]) for m in (re.match(r"downs\.(\d+)\.", name) for name in shapes) if m), default=-1)
    if not 1 <= count <= 16:
        raise UserError(f"{tensors.path} holds no Unet of denoising_diffusion_pytorch: it has {count} levels (downs.N)")
    channels = shape("time_mlp.1.weight", 2)[0] // 4
    stem, seen = shape("init_conv.weight", 4)[:2]
    out = shape("final_conv.weight", 4)[0]
    # What comes out: the image, twice it with a learned variance, half the input with self-conditioning.
    image = seen // 2 if 2 * out == seen else seen
    if out not in (image, 2 * image):
        raise UserError(
            f"{tensors.path}: a network from {seen} to {out} channels has no equivalent here: as many, twice as many "
            "(a learned variance) or half as many (self-conditioning) are read"
        )
    widths = []
    for l in range(count):
        last = f"downs.{l}.3.weight" if f"downs.{l}.3.weight" in shapes else f"downs.{l}.3.1.weight"
        width = shape(last, 4)[0]
        if not channels or width % channels:
            raise UserError(
                f"{tensors.path}: {last} leads to {width} channels, no multiple of the Unet's dim {channels}"
            )
        widths.append(width // channels)
    old = _is_old(shapes)
    levels = [f"downs.{l}.2" for l in range(count)]
    full = tuple(l for l, level in enumerate(levels) if not old and f"{level}.to_out.weight" in shapes)
    heads = [_heads(shapes, a, old, head_channels) for a in (*levels, "mid_attn")]
    memory = [m for m, _, _ in heads]
    if len(set(memory)) > 1:
        raise UserError(f"{tensors.path}: attention with {sorted(set(memory))} learned keys has no equivalent here")
    classes = shape("classes_emb.weight", 2)[0] if "classes_emb.weight" in shapes else 0
    if seen != image:
        notes.append("self-conditioning: it is shown no estimate of its own when sampling (the package would)")
    if old:
        notes.append(f"attention heads of {head_channels} channels were assumed (attn_dim_head, head_channels=...)")
    if old != bool(classes):
        raise UserError(f"{tensors.path}: a Unet of another version of denoising_diffusion_pytorch than 2")
    model = configs.network("linear_attention_unet").to_dict() | {
        "channels": channels,
        "stem_channels": 0 if stem == channels else stem,
        "multipliers": tuple(widths),
        "full_attention_levels": full,
        "heads": _short([h for _, h, _ in heads]),
        "head_channels": _short([c for _, _, c in heads]),
        "memory": memory[0],
        "downsampling": "stride" if old else "fold",
        "max_period": float(max_period),
        "cond_channels": seen - image,
    }
    return Architecture(model, (*size, image), classes, out == 2 * image), notes


def _is_old(shapes: Any) -> bool:
    """Norm and residual wrapped around attention: the class-conditional network."""
    return "downs.0.2.fn.fn.to_qkv.weight" in shapes


def _heads(shapes: Any, name: str, old: bool, head_channels: int) -> tuple[int, int, int]:
    """(memory, heads, channels per head) of the attention `name`; of a damaged one anything, which will not fit."""
    if old:
        qkv = shapes.get(f"{name}.fn.fn.to_qkv.weight", (0,))
        return 0, max(qkv[0] // (3 * head_channels), 1), head_channels
    kv = shapes.get(f"{name}.mem_kv", ())
    if len(kv) != 4:
        return 4, 4, 32
    return (kv[2], kv[1], kv[3]) if f"{name}.to_out.weight" in shapes else (kv[3], kv[1], kv[2])


def _short(values: list[int]) -> tuple[int, ...]:
    """What `linear_attention_unet` takes of each level, or of all."""
    return (values[0],) if len(set(values)) == 1 else tuple(values)


def entries(architecture: Architecture) -> list[Entry]:
    """UserError where the package has no such network."""
    if architecture.model["name"] != NAME:
        raise UserError(f"model.name={architecture.model['name']!r}: denoising_diffusion_pytorch has only {NAME}")
    o: dict[str, Any] = configs.network("linear_attention_unet").to_dict() | architecture.model
    old = bool(architecture.num_classes)
    if (o["downsampling"], bool(o["memory"])) != (("stride", False) if old else ("fold", True)) or not o["null_label"]:
        raise UserError(
            f"model.downsampling={o['downsampling']}, memory={o['memory']}, null_label={o['null_label']} with "
            f"{architecture.num_classes} classes: denoising_diffusion_pytorch has 'stride' and no memory in its "
            "class-conditional network, 'fold' and a memory in the other"
        )
    count = len(o["multipliers"])
    full = {l % count for l in o["full_attention_levels"]}
    widths = [o["stem_channels"] or o["channels"], *(o["channels"] * m for m in o["multipliers"])]

    def block(ours: str, theirs: str, cin: int, cout: int) -> list[Entry]:
        out = affine(f"{ours}/embed", f"{theirs}.mlp.1")
        for i in "12":
            out += affine(f"{ours}/conv{i}", f"{theirs}.block{i}.proj", CONV)
            out += [Entry(f"{ours}/norm{i}/scale", (f"{theirs}.block{i}.norm.g",), GAIN)]
        return out + (affine(f"{ours}/shortcut", f"{theirs}.res_conv", CONV1X1) if cin != cout else [])

    def attention(ours: str, theirs: str, linear: bool) -> list[Entry]:
        inside = f"{theirs}.fn.fn" if old else theirs
        out = [Entry(f"{ours}/norm/scale", (f"{theirs}.fn.norm.g" if old else f"{theirs}.norm.g",), GAIN)]
        out += affine(f"{ours}/qkv", f"{inside}.to_qkv", CONV1X1, bias=False)
        if o["memory"]:
            out += [Entry(f"{ours}/memory", (f"{inside}.mem_kv",), LINEAR_MEMORY if linear else FULL_MEMORY)]
        if not linear:
            return out + affine(f"{ours}/out", f"{inside}.to_out", CONV1X1)
        out += affine(f"{ours}/out", f"{inside}.to_out.0", CONV1X1)
        return [*out, Entry(f"{ours}/out_norm/scale", (f"{inside}.to_out.1.g",), GAIN)]

    def level(ours: str, theirs: str, l: int, cin: int, cout: int, resample: tuple[str, Layout]) -> list[Entry]:
        return [
            *block(f"{ours}/block1", f"{theirs}.0", cin, cout),
            *block(f"{ours}/block2", f"{theirs}.1", cin, cout),
            *attention(f"{ours}/attention", f"{theirs}.2", l not in full),
            *affine(f"{ours}/resample/conv", f"{theirs}.3{resample[0]}", resample[1]),
        ]

    out = affine("stem", "init_conv", _stem(o["cond_channels"]))
    frequencies = o["time_embedding"] != "sinusoidal"
    out += [Entry("time/frequencies", ("time_mlp.0.weights",), AS_IS)] if frequencies else []
    out += affine("time/dense1", "time_mlp.1") + affine("time/dense2", "time_mlp.3")
    if old:
        out += [Entry("label/table/embedding", ("classes_emb.weight", "null_classes_emb"), TABLE)]
        out += affine("label/dense1", "classes_mlp.0") + affine("label/dense2", "classes_mlp.2")
    down, up = ("", CONV) if old else (".1", FOLD), (".1", CONV)
    for l in range(count):
        change = down if l < count - 1 else ("", CONV)
        out += level(f"down/{l}", f"downs.{l}", l, widths[l], widths[l], change)
    for i, l in enumerate(reversed(range(count))):
        change = up if l else ("", CONV)
        out += level(f"up/{i}", f"ups.{i}", l, widths[l + 1] + widths[l], widths[l + 1], change)
    middle = widths[-1]
    out += block("middle/block1", "mid_block1", middle, middle) + block("middle/block2", "mid_block2", middle, middle)
    out += attention("middle/attention", "mid_attn", False)
    out += block("final", "final_res_block", 2 * widths[0], widths[0])
    return out + affine("head", "final_conv", CONV1X1)
