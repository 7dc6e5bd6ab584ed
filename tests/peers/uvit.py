"""U-ViT in PyTorch, written from the paper (Bao et al. 2023, figure 1) with the names of the original's state dict.

Unlike the original it takes oblong samples.
"""

import math

import torch
from torch import nn


class Attention(nn.Module):
    def __init__(self, width, heads, qkv_bias):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width, heads, hidden, qkv_bias, skip=False):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads, qkv_bias)
        self.mlp = Mlp(width, hidden)
        self.skip_linear = nn.Linear(2 * width, width) if skip else None

    def forward(self, x, skip=None):
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], -1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Patches(nn.Module):
    def __init__(self, channels, width, patch):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(self, x):
        return self.proj(x).flatten(2).mT


class UViT(nn.Module):
    def __init__(self, size, channels, width, depth, heads, patch, hidden, rows=0, qkv_bias=False, time_mlp=False,
                 conv=True, skip=True):  # fmt: skip
        super().__init__()
        self.grid, self.patch, self.width = [n // patch for n in size], patch, width
        self.extras = 2 if rows else 1
        self.patch_embed = Patches(channels, width, patch)
        self.time_embed = (
            nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))
            if time_mlp
            else nn.Identity()
        )
        if rows:
            self.label_emb = nn.Embedding(rows, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.extras + math.prod(self.grid), width))
        shared = (width, heads, hidden, qkv_bias)
        self.in_blocks = nn.ModuleList(Block(*shared) for _ in range(depth // 2))
        self.mid_block = Block(*shared)
        self.out_blocks = nn.ModuleList(Block(*shared, skip=skip) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(width)
        self.decoder_pred = nn.Linear(width, channels * patch**2)
        self.final_layer = nn.Conv2d(channels, channels, 3, padding=1) if conv else nn.Identity()

    def time_token(self, t):
        half = self.width // 2
        angle = t[:, None] * torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32) / half)
        return self.time_embed(torch.cat([angle.cos(), angle.sin()], -1))

    def forward(self, x, t, y=None):
        tokens = [self.time_token(t)[:, None], self.patch_embed(x)]
        if y is not None:
            tokens.insert(0, self.label_emb(y)[:, None])
        x = torch.cat(tokens, 1) + self.pos_embed
        given = []
        for block in self.in_blocks:
            x = block(x)
            given.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, given.pop())
        x = self.decoder_pred(self.norm(x))[:, self.extras :]
        x = x.unflatten(1, self.grid).unflatten(-1, (self.patch, self.patch, -1))
        return self.final_layer(x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3))
