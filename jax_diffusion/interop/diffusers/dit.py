"""DiTTransformer2DModel, and the Transformer2DModel that it was called when the published DiTs were saved.

It differs from the original DiT (interop/dit.py) in two numbers, which are options of ours: the frequencies of the time
embedding (frequency_shift=1) and the second LayerNorm's epsilon (1e-5). Every block has a copy of the time and label
embedding, which is meant to be one.
"""

from collections.abc import Mapping
from typing import Any

from jax_diffusion import config as configs
from jax_diffusion.errors import UserError
from jax_diffusion.interop.imported import Architecture
from jax_diffusion.interop.weights import AS_IS, DENSE, Entry, affine, patches, repeated, stacked_affine
from jax_diffusion.models.dit import sizes_of

# Fields that have one meaning here, whatever their value ...
HARMLESS = ("norm_num_groups", "upcast_attention")  # softmax is float32 always
# ... and those that must have this one (the last of them Transformer2DModel's).
ONLY = {
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "norm_elementwise_affine": False,
    "dropout": 0.0,
    "attention_type": "default",
    "only_cross_attention": False,
    "double_self_attention": False,
    "use_linear_projection": False,
    "cross_attention_dim": None,
    "num_vector_embeds": None,
    "caption_channels": None,
    "interpolation_scale": None,
    "use_additional_conditions": None,
}
# Ours from diffusers' defaults of what is read.
DEFAULTS = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": None,
    "num_layers": 28,
    "attention_bias": True,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
    "norm_eps": 1e-5,
}


def architecture(config: Mapping[str, Any]) -> Architecture:
    """The network of a config.json. UserError naming every field that has no equivalent."""
    given = {k: v for k, v in config.items() if not k.startswith("_") and k not in HARMLESS}
    if config.get("_class_name") == "Transformer2DModel":
        given = {"norm_type": "layer_norm", "activation_fn": "geglu"} | given  # its own defaults
    odd = [f"{k}={v!r}" for k, v in given.items() if k not in DEFAULTS and (k not in ONLY or ONLY[k] != v)]
    c = DEFAULTS | given
    sizes = ("num_attention_heads", "attention_head_dim", "in_channels", "num_layers", "sample_size", "patch_size",
             "num_embeds_ada_norm")  # fmt: skip
    odd += [f"{k}={c[k]!r}" for k in sizes if not isinstance(c[k], int) or c[k] < 1]
    channels, out = c["in_channels"], c["in_channels"] if c["out_channels"] is None else c["out_channels"]
    if isinstance(channels, int) and out not in (channels, 2 * channels):
        odd.append(f"out_channels={out!r} for in_channels={channels}")
    if odd:
        raise UserError(f"this DiT has no equivalent here: {', '.join(odd)}")
    model = configs.network("dit", size="").to_dict() | {
        "width": c["num_attention_heads"] * c["attention_head_dim"],
        "depth": c["num_layers"],
        "heads": c["num_attention_heads"],
        "patch": c["patch_size"],
        "qkv_bias": bool(c["attention_bias"]),
        "mlp_norm_eps": float(c["norm_eps"]),
        "frequency_shift": 1.0,
    }
    shape = (c["sample_size"], c["sample_size"], channels)
    return Architecture(model, shape, c["num_embeds_ada_norm"], out == 2 * channels)


def config_of(architecture: Architecture) -> dict[str, Any]:
    """The config.json of a network. UserError naming every option that diffusers has not."""
    options, sizes = configs.network("dit").to_dict() | architecture.model, sizes_of(architecture.model)
    same = {"frequency_shift": 1.0, "mlp_ratio": 4.0, "flow_to_data": False, "spare_channels": 0, "null_label": True,
            "uncertainty": 0}  # fmt: skip
    odd = [f"model.{k}={options[k]} (only {v})" for k, v in same.items() if options[k] != v]
    height, width, channels = architecture.shape
    if height != width:
        odd.append(f"samples of {height}x{width} (only square ones)")
    if not architecture.num_classes:
        odd.append("no labels (it always has some)")
    if architecture.cond_channels or options["cond_channels"]:
        odd.append("a condition image")
    if odd:
        raise UserError(
            f"diffusers' DiT cannot be given this network: {', '.join(odd)}; train it with these from the start"
        )
    return {
        "num_attention_heads": sizes.heads,
        "attention_head_dim": sizes.width // sizes.heads,
        "in_channels": channels,
        "out_channels": channels * (2 if architecture.learn_variance else 1),
        "num_layers": sizes.depth,
        "attention_bias": options["qkv_bias"],
        "sample_size": height,
        "patch_size": sizes.patch,
        "num_embeds_ada_norm": architecture.num_classes,
        "norm_eps": options["mlp_norm_eps"],
        **{k: ONLY[k] for k in ("norm_type", "activation_fn", "norm_elementwise_affine", "dropout")},
    }


def entries(architecture: Architecture) -> list[Entry]:
    """Ours and theirs."""
    options, sizes = architecture.model, sizes_of(architecture.model)
    blocks = [f"transformer_blocks.{i}" for i in range(sizes.depth)]

    def each(*names: str) -> list[tuple[str, ...]]:
        return [tuple(f"{block}.{name}" for name in names) for block in blocks]

    def shared(ours: str, theirs: str, layout) -> Entry:
        return Entry(ours, tuple(f"{block}.norm1.emb.{theirs}" for block in blocks), repeated(layout, len(blocks)))

    time = "timestep_embedder.linear_"
    return [
        *affine("patch_embed", "pos_embed.proj", patches(sizes.patch)),
        shared("time1/kernel", f"{time}1.weight", DENSE),
        shared("time1/bias", f"{time}1.bias", AS_IS),
        shared("time2/kernel", f"{time}2.weight", DENSE),
        shared("time2/bias", f"{time}2.bias", AS_IS),
        shared("label/embedding", "class_embedder.embedding_table.weight", AS_IS),
        *stacked_affine("stack/modulation", each("norm1.linear")),
        *stacked_affine(
            "stack/attention/qkv",
            each("attn1.to_q", "attn1.to_k", "attn1.to_v"),
            bias=options.get("qkv_bias", True),
        ),
        *stacked_affine("stack/attention/out", each("attn1.to_out.0")),
        *stacked_affine("stack/mlp/up", each("ff.net.0.proj")),
        *stacked_affine("stack/mlp/down", each("ff.net.2")),
        *affine("modulation", "proj_out_1"),
        *affine("head", "proj_out_2"),
    ]


def rename(name: str) -> str:
    """Older versions of diffusers have had the same names."""
    return name


def ignore(name: str) -> bool:
    """The position embedding follows from the config; some versions have saved it."""
    return name == "pos_embed.pos_embed"
