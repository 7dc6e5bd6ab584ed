"""OpenAI's networks of guided-diffusion, which azula carries, small and with random weights."""

import functools

import torch

from peers import compare, stand_ins

original = stand_ins.import_peer("azula.plugins.adm._src.unet")

# 64 channels: in the original's 32 groups fewer would be groups of one, whose norm takes biases and times away.
SMALL = {"image_size": 8, "in_channels": 3, "model_channels": 64, "num_res_blocks": 1, "attention_resolutions": (2,),
         "channel_mult": (1, 2)}  # fmt: skip
ADM = {"out_channels": 6, "num_classes": 4, "num_head_channels": 16, "use_scale_shift_norm": True,
       "resblock_updown": True}  # fmt: skip


def make(cls: str, **arguments) -> torch.nn.Module:
    torch.manual_seed(0)
    return compare.randomize(getattr(original, cls)(**{**SMALL, **arguments}).eval())


@functools.cache
def tensors(path: str = "some.pt"):
    """The state dict of a small ADM."""
    return compare.tensors_of(compare.state_of(make("UNetModel", **ADM)), path)
