"""PyTorch's networks, all called as `net(x, t, label)` with x [B, C, H, W] and t [B] (or a number).

diffusers' UNet2DModel, diffusers' DiTTransformer2DModel with its time and label embedding computed once instead of in
each block (JAX's network does the same, and has as many parameters), and lucidrains' Unet.
"""

import json
import pathlib
from typing import Any

import numpy as np
import torch
from torch import nn


class UNet(nn.Module):
    """UNet2DModel."""

    def __init__(self, config: dict[str, Any]):
        from diffusers import UNet2DModel

        super().__init__()
        self.net = UNet2DModel(**{k: v for k, v in config.items() if not k.startswith("_")})
        self.labelled = self.net.config.num_class_embeds is not None
        # What stays float32 where the rest is bfloat16 for sampling, as with JAX.
        self.exact = (self.net.conv_in, self.net.time_embedding, self.net.conv_out)

    def forward(self, x, t, label=None):
        return self.net(x, t, label if self.labelled else None, return_dict=False)[0]


class _Given(nn.Module):
    """In the place of a block's own embedding: the one it is handed."""

    def forward(self, timestep, class_labels, hidden_dtype=None):
        return timestep.to(hidden_dtype)


class DiT(nn.Module):
    """DiTTransformer2DModel."""

    def __init__(self, config: dict[str, Any]):
        from diffusers import DiTTransformer2DModel

        super().__init__()
        self.net = DiTTransformer2DModel(**config)
        self.embed = self.net.transformer_blocks[0].norm1.emb
        # Labels are dropped by the training step, as with JAX; in the network each call would drop others.
        self.embed.class_embedder.dropout_prob = 0.0
        self.labelled, self.exact = True, (self.embed, self.net.proj_out_2)

    def share(self) -> None:
        """After the weights were loaded, which diffusers keeps in every block."""
        for block in self.net.transformer_blocks:
            block.norm1.emb = _Given()

    def forward(self, x, t, label=None):
        embedding = self.embed(t.expand(len(x)), label, hidden_dtype=torch.float32)
        return self.net(x, embedding, label, return_dict=False)[0]


class Lucidrains(nn.Module):
    """denoising_diffusion_pytorch's Unet, with its flash_attn: scaled_dot_product_attention."""

    def __init__(self, config: dict[str, Any]):
        from denoising_diffusion_pytorch import Unet

        super().__init__()
        self.net = Unet(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}, flash_attn=True)
        self.labelled, self.exact = False, (self.net.time_mlp, self.net.init_conv, self.net.final_conv)

    def forward(self, x, t, label=None):
        return self.net(x, t.expand(len(x)))


CLASSES: dict[str, Any] = {"UNet2DModel": UNet, "DiTTransformer2DModel": DiT, "Unet": Lucidrains}


def load(folder: pathlib.Path) -> nn.Module:
    """The network that JAX's worker has left in `folder` (export.py)."""
    said = json.loads((folder / "network.json").read_text())
    net = CLASSES[said["class"]](said["config"])
    with np.load(folder / "weights.npz") as arrays:
        state = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        buffers = {name for name, _ in net.net.named_buffers()}
        missing, unknown = net.net.load_state_dict(state, strict=False)
    left = [name for name in missing if name not in buffers]
    if left or unknown:
        raise ValueError(f"weights do not fit: missing {left[:4]}, unknown {unknown[:4]}")
    if isinstance(net, DiT):
        net.share()
    return net


def halved(net: nn.Module) -> nn.Module:
    """Matmul and convolution weights in bfloat16 once and for all, for sampling under autocast: norms, embeddings and
    the first and last layer keep float32."""
    exact = {id(m) for part in net.exact for m in part.modules()}
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and id(module) not in exact:
            module.to(torch.bfloat16)
    return net
