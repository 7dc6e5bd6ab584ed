"""What the fields of diffusers' JSON files may hold, so that a damaged file is one line and not a wrong model."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from jax_diffusion.errors import UserError

MOST = 1_000_000  # of anything that is counted: beyond it is damage, and would fill the memory


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MOST


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _list_of(what: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and 0 < len(value) <= MOST and all(map(what, value))


def _ours(value: Any) -> bool:
    """What diffusers has no field for: null_label, unit_range and image_channels."""
    if not isinstance(value, dict):
        return False
    numbers = {name: v for name, v in value.items() if name == "image_channels"}
    return all(map(_count, numbers.values())) and all(isinstance(value[n], bool) for n in value.keys() - numbers)


def _text(value: Any) -> bool:
    return isinstance(value, str)


# what it should be: (whether a value is, the fields); null is left to whoever reads the field
KINDS = {
    "a whole number": (_count, (
        "in_channels", "out_channels", "norm_num_groups", "attn_norm_num_groups", "attention_head_dim",
        "num_attention_heads", "patch_size", "time_embedding_dim", "num_class_embeds", "num_embeds_ada_norm",
        "num_train_timesteps", "solver_order", "steps_offset", "downsample_padding", "correct_steps",
    )),
    "a whole number below 1000": (lambda value: _count(value) and value < 1000, ("layers_per_block", "num_layers")),
    "a number": (_number, (
        "beta_start", "beta_end", "dropout", "norm_eps", "mid_block_scale_factor", "freq_shift", "clip_sample_range",
        "sample_max_value", "dynamic_thresholding_ratio", "sigma_min", "sigma_max", "sigma_data", "rho", "snr", "shift",
        "shift_terminal",
    )),
    "a number or -Infinity": (lambda value: _number(value) or value == -math.inf, ("lambda_min_clipped",)),
    "true or false": (lambda value: isinstance(value, bool), (
        "center_input_sample", "flip_sin_to_cos", "add_attention", "attention_bias", "clip_sample", "set_alpha_to_one",
        "thresholding", "rescale_betas_zero_snr", "skip_prk_steps", "use_karras_sigmas", "use_exponential_sigmas",
        "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas", "euler_at_final", "lower_order_final", "predict_x0",
        "use_dynamic_shifting", "invert_sigmas", "stochastic_sampling",
    )),
    "a text": (_text, (
        "_class_name", "prediction_type", "beta_schedule", "timestep_spacing", "variance_type", "solver_type",
        "algorithm_type", "final_sigmas_type", "timestep_type", "sigma_schedule", "act_fn", "time_embedding_type",
        "resnet_time_scale_shift", "downsample_type", "upsample_type", "mid_block_type", "class_embed_type",
        "activation_fn", "norm_type",
    )),
    "an object of numbers and booleans": (_ours, ("_jax_diffusion",)),
    "a list of texts": (_list_of(_text), ("down_block_types", "up_block_types")),
    "a list of whole numbers": (_list_of(lambda value: _count(value) and value > 0), ("block_out_channels",)),
    "a list of numbers": (_list_of(_number), ("trained_betas",)),
    "a number or [height, width]": (
        lambda value: (_count(value) and value > 0) or (_list_of(_count)(value) and len(value) == 2 and all(value)),
        ("sample_size",),
    ),
}  # fmt: skip
_OF = {field: (what, fits) for what, (fits, fields) in KINDS.items() for field in fields}


def check(path: Any, content: Mapping[str, Any]) -> None:
    """Raises a UserError that lists the fields of `content`, read from `path`, which cannot be what they should."""
    odd = [
        f"{name}={str(value)[:40]!r} should be {_OF[name][0]}"
        for name, value in content.items()
        if name in _OF and value is not None and not _OF[name][1](value)
    ]
    if odd:
        raise UserError(f"{path} is damaged: {'; '.join(odd)}")
