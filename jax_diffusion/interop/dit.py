"""State dicts of facebookresearch/DiT, and of SiT (willisma/SiT), which has the same names.

Bare ones, as published (the averaged weights), or the "model" and "ema" of their training's checkpoints. The number of
heads, and whether it is a SiT, are in neither names nor shapes.
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
from jax_diffusion.interop.weights import Entry, affine, patches, stacked_affine
from jax_diffusion.models import transformer
from jax_diffusion.models.dit import SIZES, sizes_of

DESCRIPTION = "facebookresearch/DiT and willisma/SiT: state dicts and training checkpoints (.pt, .safetensors)"

CHECKPOINT = ("model.", "ema.")  # what its training saves, beside the optimizer
POSITION = "pos_embed"
HEADS = {width: heads for width, _, heads in SIZES.values()}


def matches(tensors: Tensors) -> bool:
    """Whether the names are a DiT's, bare or in a training checkpoint."""
    names = ("y_embedder.embedding_table.weight", "blocks.0.adaLN_modulation.1.weight")
    return any(all(prefix + name in tensors.shapes for name in names) for prefix in ("", *CHECKPOINT))


def read(
    tensors: Tensors,
    *,
    sit: bool | None = None,  # None: a SiT where the file's name says so
    heads: int = 0,  # 0: the published number for the width, else heads of 64 features
    null_label: bool = True,  # the label table's last row is "no label"; False: trained on labels alone
) -> Imported:
    """The model. Its samples are latents [H/8, W/8, 4] of Stable Diffusion's autoencoder, times 0.18215.

    Raises UserError for whatever does not fit, and where the file's position embedding is not the usual one.
    """
    trained, averaged = (tensors.under(prefix) for prefix in CHECKPOINT)
    tensors = trained or averaged or tensors
    ema = averaged if trained and averaged else None
    notes = []
    if sit is None:
        sit = re.search("(?<![a-z])sit(?![a-z])", tensors.path.stem.lower()) is not None
        notes.append(f"taken for a {'SiT' if sit else 'DiT'} by the file's name: sit={not sit} is the other")
    architecture = describe(tensors, sit=sit, heads=heads, null_label=null_label)
    if not heads:
        notes.append(f"{architecture.model['heads']} attention heads were assumed from the width")
    for source in (tensors, ema):
        _check_position(source, architecture)
    notes += [
        "samples are latents of Stable Diffusion's autoencoder, scaled by 0.18215; decoding them is not part of this",
        "guidance acts on all channels; the original's own script guides the first three alone",
    ]
    if sit:
        process = {"schedule": configs.named("flow"), "prediction": "flow", "timesteps": configs.named("uniform")}
        sampling = {"solver": "euler", "steps": 250, "grid": ""}
        notes.append("250 Euler steps, where the original takes an adaptive ODE solver or an SDE")
    else:
        process = {"schedule": configs.named("linear"), "prediction": "epsilon"}
        sampling = {"solver": "ddpm", "steps": 250, "grid": "linspace"}
    return build(
        architecture,
        entries(architecture),
        tensors,
        ema=ema,
        ignore=lambda name: name == POSITION,
        process=process,
        sampling={**sampling, "guidance": 4.0, "clip": False},
        notes=notes,
    )


def describe(tensors: Tensors, *, sit: bool, heads: int = 0, null_label: bool = True) -> Architecture:
    """The network, from the shapes of its tensors."""

    def shape(name: str, rank: int) -> tuple[int, ...]:
        found = tensors.shapes.get(name, ())
        if len(found) != rank:
            raise UserError(f"{tensors.path}: {name} is {list(found) or 'missing'}; a DiT has {rank} axes there")
        return found

    width, channels, patch, _ = shape("x_embedder.proj.weight", 4)
    tokens = shape(POSITION, 3)[1]
    side = math.isqrt(tokens)
    if side**2 != tokens:
        raise UserError(f"{tensors.path}: {tokens} positions are no square grid of patches")
    depth = 1 + max((int(m[1]) for m in (re.match(r"blocks\.(\d+)\.", name) for name in tensors) if m), default=-1)
    hidden = shape("blocks.0.mlp.fc1.weight", 2)[0]
    rows = shape("y_embedder.embedding_table.weight", 2)[0]
    out = shape("final_layer.linear.weight", 2)[0] / patch**2
    if out not in (channels, 2 * channels):
        raise UserError(
            f"{tensors.path}: {out:g} output channels for {channels} of the input: a DiT has as many or twice"
        )
    heads = heads or HEADS.get(width) or (width // 64 if width % 64 == 0 else 0)
    if not heads:
        raise UserError(f"{tensors.path}: nothing tells the number of heads of a DiT of width {width}: give heads=...")
    if rows <= null_label:
        raise UserError(
            f"{tensors.path}: its label table has {rows} row(s), which leaves no class: try null_label=False"
        )
    model = configs.network("dit", size="").to_dict() | {
        "width": width,
        "depth": depth,
        "heads": heads,
        "patch": patch,
        "mlp_ratio": hidden / width,
        "null_label": null_label,
        "flow_to_data": sit,
        "spare_channels": int(out - channels) if sit else 0,
    }
    learned = not sit and out == 2 * channels
    return Architecture(model, (side * patch, side * patch, channels), rows - null_label, learned)


def entries(architecture: Architecture) -> list[Entry]:
    """Ours and theirs. SiT's and DiT's names are the same."""
    options = architecture.model
    depth, patch = (getattr(sizes_of(options), name) for name in ("depth", "patch"))

    def each(name: str) -> list[tuple[str]]:
        return [(f"blocks.{i}.{name}",) for i in range(depth)]

    label = [Entry("label/embedding", ("y_embedder.embedding_table.weight",))] if architecture.num_classes else []
    return [
        *affine("patch_embed", "x_embedder.proj", patches(patch)),
        *affine("time1", "t_embedder.mlp.0"),
        *affine("time2", "t_embedder.mlp.2"),
        *label,
        *stacked_affine("stack/modulation", each("adaLN_modulation.1")),
        *stacked_affine("stack/attention/qkv", each("attn.qkv"), bias=options.get("qkv_bias", True)),
        *stacked_affine("stack/attention/out", each("attn.proj")),
        *stacked_affine("stack/mlp/up", each("mlp.fc1")),
        *stacked_affine("stack/mlp/down", each("mlp.fc2")),
        *affine("modulation", "final_layer.adaLN_modulation.1"),
        *affine("head", "final_layer.linear"),
    ]


def write(architecture: Architecture, params: Any) -> dict[str, np.ndarray]:
    """The original's state dict, position embedding included, which its load_state_dict takes.

    Raises UserError for networks that the original does not have.
    """
    options = configs.network("dit").to_dict() | architecture.model
    same = {"mlp_norm_eps": 1e-6, "frequency_shift": 0.0, "qkv_bias": True, "cond_channels": 0, "uncertainty": 0}
    odd = [f"model.{k}={options[k]}" for k, v in same.items() if options[k] != v]
    height, width, _ = architecture.shape
    if height != width:
        odd.append(f"samples of {height}x{width}")
    if not architecture.num_classes:
        odd.append("a network without labels")
    if odd:
        raise UserError(f"the original DiT has no {', '.join(odd)}: nothing was written")
    return {**weights.save(entries(architecture), params), POSITION: _position(architecture)}


def _position(architecture: Architecture) -> np.ndarray:
    height, width, _ = architecture.shape
    sizes = sizes_of(architecture.model)
    return transformer.position_embedding(height // sizes.patch, width // sizes.patch, sizes.width)[None]


def _check_position(tensors: Tensors | None, architecture: Architecture) -> None:
    if tensors is None:
        return
    theirs, ours = tensors[POSITION], _position(architecture)
    if theirs.shape != ours.shape or not np.allclose(theirs, ours, rtol=0, atol=1e-6):
        raise UserError(
            f"{tensors.path}: its {POSITION} is not DiT's sines and cosines for {architecture.shape[0]}x"
            f"{architecture.shape[1]} latents: a network with positions of its own has no equivalent here"
        )
