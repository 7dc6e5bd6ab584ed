"""EDM2's networks (Karras et al. 2024), state dicts of NVlabs/edm2's `Precond`.

The published files are pickles that carry their own source code, which is never executed here. In a checkout of that
repository, where they are trusted, one line makes a state dict of them:

    python -c "import pickle, torch; torch.save(pickle.load(open('in.pkl', 'rb'))['ema'].state_dict(), 'edm2.pt')"

Shapes tell everything but the heads: `head_channels`, 64 in every published network.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jax_diffusion import config as configs
from jax_diffusion.errors import UserError
from jax_diffusion.interop.imported import Architecture, Imported, build
from jax_diffusion.interop.tensors import Tensors
from jax_diffusion.interop.weights import AS_IS, CONV, CONV1X1, DENSE, Entry, Layout

DESCRIPTION = "state dicts of NVlabs/edm2 (Precond)"
# log sigma ~ N(mean, std^2) in training (table 6), by whether the samples are pixels or latents.
NOISE = {"pixels": (-0.8, 1.6), "latents": (-0.4, 1.0)}


def matches(tensors: Mapping[str, Any]) -> bool:
    return "unet.out_gain" in tensors and "unet.emb_fourier.freqs" in tensors


def _gathered(heads: int) -> Layout:
    """q, k and v: their channels are (head, channel, which), ours (which, head, channel)."""

    def to_ours(arrays):
        matrix = CONV1X1.to_ours(arrays)
        rows = len(matrix)
        return matrix.reshape(rows, heads, -1, 3).transpose(0, 3, 1, 2).reshape(rows, -1)

    def to_theirs(matrix):
        rows = len(matrix)
        return CONV1X1.to_theirs(matrix.reshape(rows, 3, heads, -1).transpose(0, 2, 3, 1).reshape(rows, -1))

    return Layout(to_ours, to_theirs)


def architecture(tensors: Tensors, *, head_channels: int = 64) -> Architecture:
    """The network that the names and shapes describe. UserError where they describe none of ours."""
    shapes = tensors.shapes

    def shape(name: str) -> tuple[int, ...]:
        if name not in shapes:
            raise UserError(f"{tensors.path} is no whole EDM2 network: it has no {name}")
        return shapes[name]

    def where(pattern: str) -> list[int]:
        found = (re.fullmatch(pattern, name) for name in shapes)
        return sorted({int(m.group(1)) for m in found if m}, reverse=True)

    sizes = where(r"unet\.enc\.(\d+)x\1_block0\.conv_res0\.weight")
    if not sizes or sizes != [sizes[0] >> i for i in range(len(sizes))]:
        raise UserError(f"{tensors.path}: levels of sizes {sizes} are no EDM2 network, whose sizes halve")
    names = [f"{n}x{n}" for n in sizes]
    widths = [shape(f"unet.enc.{n}_block0.conv_res0.weight")[0] for n in names]
    blocks = [len(where(rf"unet\.enc\.{n}_block(\d+)\.conv_res0\.weight")) for n in names]
    attends = [len(where(rf"unet\.enc\.{n}_block(\d+)\.attn_qkv\.weight")) for n in names]
    attending = [w for w, n in zip(widths, attends, strict=True) if n]
    if f"unet.dec.{names[-1]}_in0.attn_qkv.weight" in shapes:
        attending.append(widths[-1])
    if min(attending, default=head_channels) < head_channels:
        raise UserError(
            f"head_channels={head_channels} is more than the channels of a level that attends in {tensors.path}, whose "
            f"levels have {widths}: give the width of a head that it was trained with"
        )
    if len(set(blocks)) > 1 or any(a not in (0, b) for a, b in zip(attends, blocks, strict=True)):
        raise UserError(
            f"{tensors.path}: {blocks} blocks per level, {attends} of them with attention; every level needs as many "
            "blocks, and attention in all or none of them"
        )
    emb, noise = shape("unet.emb_noise.weight")
    channels = int(np.gcd.reduce([*widths, emb, noise]))  # the unit that every width is a multiple of
    stem = shape(f"unet.enc.{names[0]}_conv.weight")
    label = shapes.get("unet.emb_label.weight", (0, 0))[1]
    model = {
        "name": "edm2",
        "channels": channels,
        "multipliers": tuple(w // channels for w in widths),
        "noise_multiplier": noise // channels,
        "embedding_multiplier": emb // channels,
        "blocks": blocks[0],
        "attention_levels": tuple(i for i, a in enumerate(attends) if a),
        "head_channels": head_channels,
        "dropout": 0.0,
        "null_label": False,
        "uncertainty": shapes.get("logvar_linear.weight", (1, 0))[1],
        "remat": False,
        "dtype": "float32",
    }
    return Architecture(model, (sizes[0], sizes[0], stem[1] - 1), num_classes=label)


def entries(a: Architecture) -> list[Entry]:
    """Which of our parameters is which of theirs."""
    m = a.model
    widths = [m["channels"] * k for k in m["multipliers"]]
    names = [f"{a.shape[0] >> i}x{a.shape[0] >> i}" for i in range(len(widths))]

    def fourier(ours: str, theirs: str) -> list[Entry]:
        return [Entry(f"{ours}/frequencies", (f"{theirs}.freqs",)), Entry(f"{ours}/phases", (f"{theirs}.phases",))]

    def weight(ours: str, theirs: str, layout: Layout) -> Entry:
        return Entry(f"{ours}/kernel", (f"{theirs}.weight",), layout)

    def block(ours: str, theirs: str, cin: int, cout: int, attends: bool) -> list[Entry]:
        out = [
            Entry(f"{ours}/embed_gain", (f"{theirs}.emb_gain",), AS_IS),
            weight(f"{ours}/embed", f"{theirs}.emb_linear", DENSE),
            weight(f"{ours}/conv1", f"{theirs}.conv_res0", CONV),
            weight(f"{ours}/conv2", f"{theirs}.conv_res1", CONV),
        ]
        if cin != cout:
            out.append(weight(f"{ours}/shortcut", f"{theirs}.conv_skip", CONV1X1))
        heads = cout // m["head_channels"] if attends else 0
        if heads:
            out.append(weight(f"{ours}/attention/qkv", f"{theirs}.attn_qkv", _gathered(heads)))
            out.append(weight(f"{ours}/attention/out", f"{theirs}.attn_proj", CONV1X1))
        return out

    out = [
        *fourier("fourier", "unet.emb_fourier"),
        weight("noise", "unet.emb_noise", DENSE),
        weight("stem", f"unet.enc.{names[0]}_conv", CONV),
        weight("head", "unet.out_conv", CONV),
        Entry("head_gain", ("unet.out_gain",), AS_IS),
    ]
    if a.num_classes:
        out.append(weight("label", "unet.emb_label", DENSE))
    if m["uncertainty"]:
        out += fourier("uncertainty/fourier", "logvar_fourier")
        out.append(weight("uncertainty/linear", "logvar_linear", DENSE))
    encoder, decoder = _blocks(names, widths, m["blocks"], m["attention_levels"])
    for side, theirs, listed in (("encoder", "unet.enc", encoder), ("decoder", "unet.dec", decoder)):
        for i, (name, *rest) in enumerate(listed):
            out += block(f"{side}/{i}", f"{theirs}.{name}", *rest)
    return out


def _blocks(names: list[str], widths: list[int], blocks: int, attending) -> tuple[list[tuple], list[tuple]]:
    """(name, channels in, channels out, attends) of the encoder's and the decoder's blocks, in order."""
    levels = list(enumerate(zip(names, widths, strict=True)))
    width, skips = widths[0], [widths[0]]
    encoder, decoder = [], []
    for i, (name, wide) in levels:
        if i:
            encoder.append((f"{name}_down", width, width, False))
            skips.append(width)
        for n in range(blocks):
            encoder.append((f"{name}_block{n}", width, wide, i in attending))
            width = wide
            skips.append(width)
    for i, (name, wide) in reversed(levels):
        if i == len(levels) - 1:
            decoder += [(f"{name}_in0", width, width, True), (f"{name}_in1", width, width, False)]
        else:
            decoder.append((f"{name}_up", width, width, False))
        for n in range(blocks + 1):
            decoder.append((f"{name}_block{n}", width + skips.pop(), wide, i in attending))
            width = wide
    return encoder, decoder


def read(tensors: Tensors, *, head_channels: int = 64, sigma_data: float = 0.5) -> Imported:
    """The model of a state dict. head_channels: channels per attention head.  sigma_data: of the preconditioning."""
    a = architecture(tensors, head_channels=head_channels)
    latents = a.shape[-1] not in (1, 3)
    mean, std = NOISE["latents" if latents else "pixels"]
    notes = [f"attention heads of {head_channels} channels"]
    if latents:
        notes.append(f"{a.shape[-1]} channels are taken for latents: samples are not clipped, and need their decoder")
    return build(
        a,
        entries(a),
        tensors,
        process={
            "schedule": configs.named("edm"),
            "prediction": "edm",
            "weighting": configs.named("edm"),
            "timesteps": configs.named("log_normal", mean=mean, std=std),
            "sigma_data": sigma_data,
        },
        sampling={"solver": "heun", "steps": 32, "grid": "karras", "clip": not latents},
        notes=notes,
    )
