"""State dicts of baofff/U-ViT: nnet.pth and nnet_ema.pth, as published and as its training saves them.

The number of heads and the process are in neither names nor shapes: what is published tells them.
"""

import math
import re
from typing import Any

import numpy as np

from jax_diffusion import config as configs
from jax_diffusion.errors import UserError
from jax_diffusion.interop import weights
from jax_diffusion.interop.imported import Architecture, Imported, build
from jax_diffusion.interop.tensors import Tensors
from jax_diffusion.interop.weights import (
    AS_IS,
    CONV,
    DENSE,
    Entry,
    Layout,
    affine,
    norm,
    patches,
    stacked,
    stacked_affine,
)
from jax_diffusion.models.uvit import SIZES, sizes_of

DESCRIPTION = "baofff/U-ViT: state dicts, nnet.pth or nnet_ema.pth (.pth, .safetensors)"

HEADS = {width: heads for width, _, heads in SIZES.values()}
IMAGENET = 1000


def matches(tensors: Tensors) -> bool:
    """Whether the names are a U-ViT's."""
    return {"in_blocks.0.attn.qkv.weight", "mid_block.attn.qkv.weight", "decoder_pred.weight"} <= set(tensors)


def read(
    tensors: Tensors,
    *,
    heads: int = 0,  # 0: the published number for the width, else heads of 64 features
    null_label: bool | None = None,  # the label table's last row is "no label"; None: unless it has 1000 rows
    discrete: bool | None = None,  # trained on Stable Diffusion's 1000 steps, not the VP-SDE; None: the networks
    # without a final convolution (the published H)
) -> Imported:
    """The model. Four channels are latents of Stable Diffusion's autoencoder, times 0.18215 (0.23010 for 512x512).

    Raises UserError for whatever does not fit.
    """
    notes = []
    if "context_embed.weight" in tensors.shapes:
        raise UserError(f"{tensors.path} is a U-ViT conditioned on text, which has no equivalent here")
    rows = tensors.shapes.get("label_emb.weight", (0,))[0]
    if null_label is None:
        null_label = rows != IMAGENET
        if rows:
            notes.append(f"of the {rows} labels the last {'is taken to mean' if null_label else 'does not mean'} none")
    if discrete is None:
        discrete = "final_layer.weight" not in tensors.shapes
        process = "Stable Diffusion's 1000 steps" if discrete else "the VP-SDE"
        notes.append(f"taken to be trained on {process}: discrete={not discrete} is the other")
    architecture = describe(tensors, heads=heads, null_label=null_label, discrete=discrete)
    if not heads:
        notes.append(f"{architecture.model['heads']} attention heads were assumed from the width")
    latents = architecture.shape[-1] == 4
    if latents:
        notes.append("samples are latents of Stable Diffusion's autoencoder; decoding them is not part of this")
    guided = latents and architecture.num_classes and null_label
    return build(
        architecture,
        entries(architecture),
        tensors,
        process={"schedule": configs.named("scaled_linear" if discrete else "vp"), "prediction": "epsilon"},
        sampling={
            "solver": "dpmpp_2m",
            "steps": 50,
            "grid": "",
            "clip": not latents,
            "guidance": 1.4 if guided else 1.0,  # 0.4 in the original's convention
        },
        notes=notes,
    )


def describe(tensors: Tensors, *, heads: int = 0, null_label: bool = True, discrete: bool = False) -> Architecture:
    """The network, from the shapes of its tensors."""

    def shape(name: str, rank: int) -> tuple[int, ...]:
        found = tensors.shapes.get(name, ())
        if len(found) != rank:
            raise UserError(f"{tensors.path}: {name} is {list(found) or 'missing'}; a U-ViT has {rank} axes there")
        return found

    width, channels, patch, _ = shape("patch_embed.proj.weight", 4)
    rows = shape("label_emb.weight", 2)[0] if "label_emb.weight" in tensors.shapes else 0
    tokens = shape("pos_embed", 3)[1] - (2 if rows else 1)
    side = math.isqrt(max(tokens, 0))
    if side**2 != tokens or not side:
        raise UserError(f"{tensors.path}: {tokens} positions of patches are no square")
    halves = (int(m[1]) for m in (re.match(r"in_blocks\.(\d+)\.", name) for name in tensors) if m)
    hidden = shape("mid_block.mlp.fc1.weight", 2)[0]
    heads = heads or HEADS.get(width) or (width // 64 if width % 64 == 0 else 0)
    if not heads:
        raise UserError(
            f"{tensors.path}: nothing tells the number of heads of a U-ViT of width {width}: give heads=..."
        )
    if rows and rows <= null_label:
        raise UserError(
            f"{tensors.path}: its label table has {rows} row(s), which leaves no class: give null_label=False"
        )
    model = configs.network("uvit", size="").to_dict() | {
        "width": width,
        "depth": 2 * (1 + max(halves, default=-1)),
        "heads": heads,
        "patch": patch,
        "mlp_ratio": hidden / width,
        "qkv_bias": "mid_block.attn.qkv.bias" in tensors.shapes,
        "skip": "out_blocks.0.skip_linear.weight" in tensors.shapes,
        "time_mlp": "time_embed.0.weight" in tensors.shapes,
        "conv": "final_layer.weight" in tensors.shapes,
        "null_label": null_label,
        # The discrete process counts from 1; the continuous one shows 999 t for our 1000 t.
        "time_scale": 1.0 if discrete else 0.999,
        "time_offset": 1.0 if discrete else 0.0,
    }
    return Architecture(model, (side * patch, side * patch, channels), rows - null_label if rows else 0)


def _stacked_norm(ours: str, theirs: list[str]) -> list[Entry]:
    pairs = (("scale", "weight"), ("bias", "bias"))
    return [Entry(f"{ours}/{our}", tuple(f"{n}.{their}" for n in theirs), stacked(AS_IS)) for our, their in pairs]


def entries(architecture: Architecture) -> list[Entry]:
    """Ours and theirs."""
    options = configs.network("uvit").to_dict() | architecture.model
    sizes = sizes_of(options)
    bias = options["qkv_bias"]

    def stack(ours: str, blocks: list[str], skip: bool) -> list[Entry]:
        def each(name: str) -> list[tuple[str]]:
            return [(f"{block}.{name}",) for block in blocks]

        return [
            *(stacked_affine(f"{ours}/skip", each("skip_linear")) if skip else []),
            *_stacked_norm(f"{ours}/norm1", [f"{block}.norm1" for block in blocks]),
            *stacked_affine(f"{ours}/attention/qkv", each("attn.qkv"), bias=bias),
            *stacked_affine(f"{ours}/attention/out", each("attn.proj")),
            *_stacked_norm(f"{ours}/norm2", [f"{block}.norm2" for block in blocks]),
            *stacked_affine(f"{ours}/mlp/up", each("mlp.fc1")),
            *stacked_affine(f"{ours}/mlp/down", each("mlp.fc2")),
        ]

    half = range(sizes.depth // 2)
    position = Layout(lambda arrays: arrays[0][0], lambda array: (array[None],))
    out = [
        *affine("patch_embed", "patch_embed.proj", patches(sizes.patch)),
        Entry("position", ("pos_embed",), position),
        *stack("in_stack", [f"in_blocks.{i}" for i in half], False),
        # The first of theirs takes what our last gave.
        *stack("out_stack", [f"out_blocks.{i}" for i in reversed(half)], options["skip"]),
        *norm("middle/norm1", "mid_block.norm1"),
        *affine("middle/attention/qkv", "mid_block.attn.qkv", DENSE, bias=bias),
        *affine("middle/attention/out", "mid_block.attn.proj"),
        *norm("middle/norm2", "mid_block.norm2"),
        *affine("middle/mlp/up", "mid_block.mlp.fc1"),
        *affine("middle/mlp/down", "mid_block.mlp.fc2"),
        *norm("norm", "norm"),
        *affine("head", "decoder_pred"),
    ]
    if architecture.num_classes:
        out.append(Entry("label/embedding", ("label_emb.weight",)))
    if options["time_mlp"]:
        out += [*affine("time1", "time_embed.0"), *affine("time2", "time_embed.2")]
    if options["conv"]:
        out += affine("conv", "final_layer", CONV)
    return out


def write(architecture: Architecture, params: Any) -> dict[str, np.ndarray]:
    """The original's state dict, which its load_state_dict takes. UserError for networks that it does not have."""
    height, width, _ = architecture.shape
    if height != width or architecture.learn_variance or architecture.cond_channels:
        raise UserError(
            f"the original U-ViT has no samples of {height}x{width}, learned variance or condition image: "
            "nothing was written"
        )
    return weights.save(entries(architecture), params)
