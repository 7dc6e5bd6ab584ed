"""Small UNet2DModels of diffusers with random weights: every block and field that published models use.

google/ddpm-*, the consistency models and the rest are these at another size.
"""

import functools

import diffusers
import torch

from peers import compare

SMALL = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8,
         "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
         "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}  # fmt: skip
CONFIGS = {
    "ddpm": {  # google/ddpm-cifar10-32: one head, sine first, the frequencies of DDPM's code
        "sample_size": 8, "layers_per_block": 2, "attention_head_dim": None, "flip_sin_to_cos": False, "freq_shift": 1,
        "downsample_padding": 0, "norm_eps": 1e-6,
    },
    "grey_oblong_no_attention": {
        "sample_size": (8, 12), "in_channels": 1, "out_channels": 1, "downsample_padding": 1, "dropout": 0.1,
        "down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "add_attention": False, "act_fn": "mish", "time_embedding_dim": 40, "mid_block_scale_factor": 2**0.5,
    },
    "consistency": {  # openai/diffusers-cd_imagenet64_l2: ADM's blocks, heads, classes
        "sample_size": 8, "attention_head_dim": 8, "attn_norm_num_groups": 4, "num_class_embeds": 4,
        "downsample_type": "resnet", "upsample_type": "resnet", "resnet_time_scale_shift": "scale_shift",
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    },
    "middle_without_norm_learned_variance": {
        "sample_size": 8, "out_channels": 6, "attention_head_dim": 8, "resnet_time_scale_shift": "scale_shift",
        "downsample_padding": 0, "act_fn": "gelu", "center_input_sample": True, "mid_block_scale_factor": 1.5,
        "num_class_embeds": 5,
    },
    "noise_levels_no_middle_conditioned": {  # Fourier features of log sigma; a grey image beside the input
        "sample_size": (4, 8), "in_channels": 4, "out_channels": 3, "block_out_channels": (16, 24),
        "time_embedding_type": "fourier", "mid_block_type": None, "act_fn": "relu", "attention_head_dim": 4,
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
    },
}  # fmt: skip


@functools.cache
def make(name: str) -> diffusers.UNet2DModel:
    """The network, every parameter off its initial value."""
    torch.manual_seed(0)
    return compare.randomize(diffusers.UNet2DModel(**{**SMALL, **CONFIGS[name]}).eval())
