"""EDM's networks (Karras et al. 2022, github.com/NVlabs/edm): SongUNet and DhariwalUNet under any preconditioning.

The published files are pickles that carry source code, which is never executed here. In a checkout of that repository

    python -c "import pickle, torch; torch.save(pickle.load(open('x.pkl', 'rb'))['ema'].state_dict(), 'x.pt')"

writes what this module reads. SongUNet is our `song_unet`; DhariwalUNet is our `unet` with ADM's options.
"""

import re
from typing import Any

import numpy as np

from jax_diffusion import config as configs
from jax_diffusion.errors import UserError, choose
from jax_diffusion.interop import imported
from jax_diffusion.interop.imported import Architecture, Imported
from jax_diffusion.interop.tensors import Tensors
from jax_diffusion.interop.weights import CONV, CONV1X1, DENSE, Entry, Layout, affine, norm, save
from jax_diffusion.models.filters import FILTERS

EXPORT = "torch.save(pickle.load(open('x.pkl', 'rb'))['ema'].state_dict(), 'x.pt'), in a checkout of NVlabs/edm"
DESCRIPTION = f"state dicts of EDM's networks (DDPM++, NCSN++, ADM); from the published pickles: {EXPORT}"
HEAD_CHANNELS = 64  # of ADM's heads
PRECONDITIONING = ("edm", "vp", "ve", "iddpm")


def matches(tensors: Tensors) -> bool:
    names = [name.removeprefix("model.") for name in tensors]
    return "map_layer0.weight" in names and any(re.fullmatch(r"enc\.\d+x\d+_conv\.weight", name) for name in names)


def read(tensors: Tensors, *, precond: str = "", sigma_data: float = 0.5, dropout: float = 0.0) -> Imported:
    """precond: "edm", "vp", "ve" or "iddpm", what was trained around the network; "" is "iddpm" where the file holds
    its noise levels, else "edm": nothing else tells them apart. dropout: for fine-tuning, weights do not tell it."""
    choose("precond", precond, ("", *PRECONDITIONING))
    notes = []
    if not precond:
        precond = "iddpm" if "u" in tensors else "edm"
        notes.append(f"read as a network with {precond} preconditioning; say precond=... if it has another")
    if precond == "iddpm" and "u" not in tensors:
        raise UserError(f"{tensors.path}: precond='iddpm' saves its noise levels as 'u', which this file lacks")
    prefix = "model." if "model.map_layer0.weight" in tensors else ""
    architecture = describe(tensors, prefix)
    if architecture.learn_variance != (precond == "iddpm"):
        raise UserError(
            f"{tensors.path}: precond={precond!r} does not go with this network: those of iddpm, and no others, have "
            "twice as many channels at the output as at the input"
        )
    architecture.model["dropout"] = dropout
    process, options = _process(tensors, architecture, precond, sigma_data)
    architecture.model.update(options)
    sampling = {"solver": "heun", "steps": 18, "grid": "karras", "clip": False}
    unused = f"{prefix}map_augment.weight" if architecture.model["name"] == "unet" else ""
    if unused in tensors:
        notes.append("map_augment is left out: it adds nothing at sampling, where no augmentation is described")
    return imported.build(
        architecture,
        entries(architecture, prefix),
        tensors,
        ignore=lambda name: name.endswith(".resample_filter") or name in ("u", unused),
        process=process,
        sampling={} if precond == "iddpm" else sampling,
        notes=notes,
    )


def _process(tensors, architecture, precond, sigma_data) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of config.process, and the network's options, that make ours the denoiser of a preconditioning."""
    named = configs.named
    if precond in ("vp", "ve") and architecture.model["name"] != "song_unet":
        raise UserError(f"{tensors.path}: precond={precond!r} goes with SongUNet alone; this is a DhariwalUNet")
    if precond == "edm":
        times = named("log_normal", mean=-1.2, std=1.2)
        return {"schedule": named("edm"), "prediction": "edm", "weighting": named("edm"), "timesteps": times,
                "sigma_data": sigma_data}, {}  # fmt: skip
    if precond == "vp":  # times are counted to 999
        return {"schedule": named("vp", beta_min=0.1, beta_max=20.0), "prediction": "epsilon"}, {"time_scale": 0.999}
    if precond == "ve":  # trained on images in [0, 1], shown in [-1, 1]
        schedule = named("ve", sigma_min=0.02, sigma_max=100.0)
        if architecture.model["time_embedding"] != "fourier":
            raise UserError(f"{tensors.path}: precond='ve' without a Fourier embedding has no equivalent here")
        options = {"time_embedding": "log_fourier", "center_input": True, "unit_range": True}
        return {"schedule": schedule, "prediction": "score", "raw_inputs": True}, options
    return {"schedule": named("cosine", steps=1000), "prediction": "epsilon"}, {}


def describe(tensors: Tensors, prefix: str = "model.") -> Architecture:
    """The network that names and shapes tell of. UserError where they tell of none that we have."""
    shapes = {name.removeprefix(prefix): shape for name, shape in tensors.shapes.items()}

    def shape(name: str) -> tuple[int, ...]:
        if name not in shapes:
            raise UserError(
                f"{tensors.path} lacks {prefix}{name}, without which the network cannot be told: is it whole?"
            )
        return shapes[name]

    def whole(a: int, b: int, what: str) -> int:
        if a % b:
            raise UserError(f"{tensors.path}: {what} of {a} channels is no multiple of the {b} that the others are of")
        return a // b

    matches = [re.match(r"enc\.(\d+)x\1_(\w+?)(\d*)\.", name) for name in shapes]
    found = [(int(m[1]), m[2], m[3]) for m in matches if m]
    sizes = sorted({size for size, _, _ in found}, reverse=True)
    if sizes != [sizes[0] >> level for level in range(len(sizes))]:
        raise UserError(f"{tensors.path}: the resolutions {sizes} of the encoder are not halves of each other")
    names = [f"{s}x{s}" for s in sizes]
    blocks = 1 + max((int(index) for _, kind, index in found if kind == "block"), default=-1)
    embedding, noise = shape("map_layer0.weight")
    width, image_channels = shape(f"enc.{names[0]}_conv.weight")[:2]
    song = f"dec.{names[0]}_aux_conv.weight" in shapes
    channels = width if song else noise
    kinds = {kind for _, kind, _ in found}
    head = f"dec.{names[0]}_aux_conv.weight" if song else "out_conv.weight"
    num_classes = shapes["map_label.weight"][1] if "map_label.weight" in shapes else 0
    model = {
        **(configs.network("song_unet").to_dict() if song else {"name": "unet"}),
        "channels": channels,
        "multipliers": tuple(whole(shape(f"enc.{n}_block0.conv0.weight")[0], channels, f"level {n}") for n in names),
        "blocks": blocks,
        "attention_levels": tuple(l for l, n in enumerate(names) if f"enc.{n}_block0.qkv.weight" in shapes),
        "null_label": False,
    }
    if song:
        model |= {
            "time_embedding": "fourier" if "map_noise.freqs" in shapes else "sinusoidal",
            "noise_width": whole(noise, channels, "the noise embedding"),
            "embedding_width": whole(embedding, channels, "the embedding"),
            "encoder": "skip" if "aux_skip" in kinds else "residual" if "aux_residual" in kinds else "standard",
            "decoder": "skip" if len(names) > 1 and f"dec.{names[-1]}_aux_conv.weight" in shapes else "standard",
            "augment_dim": shapes["map_augment.weight"][1] if "map_augment.weight" in shapes else 0,
        }  # fmt: skip
    else:
        model |= {"scale_shift": True, "resblock_updown": True, "head_channels": HEAD_CHANNELS, "norm_eps": 1e-5}
        model["stem_channels"] = 0 if width == channels else width
        model["embedding_channels"] = 0 if embedding == 4 * channels else embedding
    taps = _taps(tensors, (1, 1))
    if song:
        model["resample_filter"] = taps
    elif taps != (1, 1):
        raise UserError(f"{tensors.path}: resample_filter {taps} of a DhariwalUNet is unknown: it has (1, 1)")
    learn_variance = shape(head)[0] == 2 * image_channels
    return Architecture(model, (sizes[0], sizes[0], image_channels), num_classes, learn_variance)


def _filter(taps: tuple[int, ...]) -> np.ndarray:
    return np.outer(taps, taps).astype(np.float32)[None, None] / sum(taps) ** 2


def _taps(tensors: Tensors, otherwise: tuple[int, ...]) -> tuple[int, ...]:
    """The filter that all buffers named resample_filter hold."""
    held = {name: tensors[name] for name in tensors if name.endswith(".resample_filter")}
    for taps in FILTERS:
        want = _filter(taps)
        if held and all(a.shape == want.shape and np.allclose(a, want, atol=1e-4) for a in held.values()):
            return taps
    if held:
        raise UserError(f"{tensors.path}: {next(iter(held))} is none of the filters {FILTERS}, or they differ")
    return otherwise


def entries(architecture: Architecture, prefix: str = "model.") -> list[Entry]:
    """Our parameters in terms of theirs."""
    model = architecture.model
    song, blocks, attends = model["name"] == "song_unet", model["blocks"], model["attention_levels"]
    names = [f"{architecture.shape[0] >> l}x{architecture.shape[0] >> l}" for l in range(len(model["multipliers"]))]
    width = [round(model["channels"] * m) for m in model["multipliers"]]
    out = [*affine("time1", f"{prefix}map_layer0"), *affine("time2", f"{prefix}map_layer1")]
    out += affine("stem", f"{prefix}enc.{names[0]}_conv", CONV)
    if architecture.num_classes:
        label = f"{prefix}map_label"
        out += affine("label", label) if song else [Entry("label/embedding", (f"{label}.weight",), DENSE)]
    if song and model["time_embedding"] != "sinusoidal":
        out.append(Entry("fourier/frequencies", (f"{prefix}map_noise.freqs",)))
    if song and model["augment_dim"]:
        out += affine("augment", f"{prefix}map_augment", bias=False)

    def block(ours, theirs, level, attention=False, projected=False):
        heads = 1 if song else width[level] // HEAD_CHANNELS
        theirs = prefix + theirs
        return _block(ours, theirs, song, heads if attention else 0, projected)

    # Input channels of the decoder's blocks are never those of their output; the encoder's are, but for the first.
    before = [model.get("stem_channels") or model["channels"], *width]
    down = 0  # in unet, changes of size are in the list of blocks
    for level, name in enumerate(names):
        if level and song:
            out += block(f"shrink/{level - 1}", f"enc.{name}_down", level - 1, projected=True)
            if model["encoder"] != "standard":
                kind = {"skip": "aux_skip", "residual": "aux_residual"}[model["encoder"]]
                out += affine(f"inputs/{level - 1}", f"{prefix}enc.{name}_{kind}", CONV)
        elif level:
            out += block(f"down/{down}", f"enc.{name}_down", level - 1)
            down += 1
        for i in range(blocks):
            changes = i == 0 and before[level] != width[level]
            out += block(f"down/{down}", f"enc.{name}_block{i}", level, level in attends, changes)
            down += 1
    last = len(names) - 1
    out += block("middle/0", f"dec.{names[last]}_in0", last, True)
    out += block("middle/1", f"dec.{names[last]}_in1", last)
    for turn, (level, name) in enumerate(reversed(list(enumerate(names)))):
        if turn:
            out += block(f"grow/{turn - 1}", f"dec.{name}_up", level + 1, projected=song)
        for i in range(blocks + 1):
            attention = level in attends and (i == blocks or not song)
            out += block(f"up/{turn * (blocks + 1) + i}", f"dec.{name}_block{i}", level, attention, True)
        if song and (model["decoder"] == "skip" or level == 0):
            j = turn if model["decoder"] == "skip" else 0
            out += norm(f"norms/{j}", f"{prefix}dec.{name}_aux_norm")
            out += affine(f"heads/{j}", f"{prefix}dec.{name}_aux_conv", CONV)
    if not song:
        out += [*norm("norm", f"{prefix}out_norm"), *affine("head", f"{prefix}out_conv", CONV)]
    return out


def _block(ours: str, theirs: str, song: bool, heads: int, projected: bool) -> list[Entry]:
    attention = f"{ours}/attention"
    ours = ours if song else f"{ours}/block"
    out = [*norm(f"{ours}/norm1", f"{theirs}.norm0"), *affine(f"{ours}/conv1", f"{theirs}.conv0", CONV)]
    out += [*affine(f"{ours}/embed", f"{theirs}.affine"), *norm(f"{ours}/norm2", f"{theirs}.norm1")]
    out += affine(f"{ours}/conv2", f"{theirs}.conv1", CONV)
    if projected:
        out += affine(f"{ours}/shortcut", f"{theirs}.skip", CONV)
    if heads:
        kernel, bias = _interleaved(heads)
        out += norm(f"{attention}/norm", f"{theirs}.norm2")
        out += [Entry(f"{attention}/qkv/kernel", (f"{theirs}.qkv.weight",), kernel)]
        out += [Entry(f"{attention}/qkv/bias", (f"{theirs}.qkv.bias",), bias)]
        out += affine(f"{attention}/out", f"{theirs}.proj", CONV1X1)
    return out


def _interleaved(heads: int) -> tuple[Layout, Layout]:
    """Rows of theirs are (head, channel, query key or value), columns of ours (query key or value, head, channel)."""

    def ours(a):
        return np.moveaxis(a.reshape(heads, -1, 3, *a.shape[1:]), 2, 0).reshape(a.shape)

    def theirs(a):
        return np.moveaxis(a.reshape(3, heads, -1, *a.shape[1:]), 0, 2).reshape(a.shape)

    kernel = Layout(lambda a: ours(a[0][:, :, 0, 0]).T, lambda a: (theirs(a.T)[:, :, None, None],))
    return kernel, Layout(lambda a: ours(a[0]), lambda a: (theirs(a),))


# What EDM's networks are, in our options; an option that is not here may have any value.
_SONG = {"heads": 1, "head_channels": 0, "group_rule": "edm", "cond_channels": 0, "uncertainty": 0}
_DHARIWAL = {"scale_shift": True, "resblock_updown": True, "head_channels": HEAD_CHANNELS, "activation": "silu",
             "middle": "attention", "middle_norm_groups": 0, "middle_scale": 1.0, "time_embedding": "sinusoidal",
             "frequency_shift": 0.0, "sine_first": False, "center_input": False, "cond_channels": 0, "patch": 1,
             "norm_groups": 0, "norm_eps": 1e-5, "uncertainty": 0}  # fmt: skip


def _check_writable(architecture: Architecture) -> None:
    model, (height, width, _) = architecture.model, architecture.shape
    known = {"song_unet": _SONG, "unet": _DHARIWAL}.get(model["name"])
    if known is None:
        raise UserError(f"model.name={model['name']!r} has no equivalent among EDM's networks: song_unet and unet have")
    known = known | ({"null_label": False} if architecture.num_classes else {})
    odd = [f"model.{k}={model[k]!r} (there {v!r})" for k, v in known.items() if model.get(k, v) != v]
    odd += [f"{height}x{width} pixels (there a square)"] if height != width else []
    if odd:
        raise UserError(f"EDM's network of this kind has no equivalent of {', '.join(odd)}")


def write(architecture: Architecture, params: Any, prefix: str = "model.") -> dict[str, np.ndarray]:
    """The original's state dict, which the load_state_dict of its EDMPrecond takes: our parameters under their names,
    and the filters. UserError for networks that it does not have."""
    _check_writable(architecture)
    out = save(entries(architecture, prefix), params)
    taps = architecture.model.get("resample_filter", (1, 1))
    buffer = _filter(taps)
    resized = re.compile(r"(.*_(?:down|up))\.norm0\.weight|(.*_aux_residual)\.weight")
    for name in list(out):
        match = resized.fullmatch(name)
        if match and match[1]:
            out |= {f"{match[1]}.{part}.resample_filter": buffer for part in ("conv0", "skip")}
        elif match:
            out[f"{match[2]}.resample_filter"] = buffer
    names = [f"{architecture.shape[0] >> l}" for l in range(len(architecture.model["multipliers"]))]
    if architecture.model.get("encoder") == "skip":
        out |= {f"{prefix}enc.{n}x{n}_aux_down.resample_filter": buffer for n in names[1:]}
    if architecture.model.get("decoder") == "skip":
        out |= {f"{prefix}dec.{n}x{n}_aux_up.resample_filter": buffer for n in names[:-1]}
    return out
