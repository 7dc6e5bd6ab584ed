"""DiT in PyTorch, written from the paper (Peebles & Xie 2023, figure 3) with the names of the original's state dict.

Unlike the original it takes oblong samples, a label table without a null label, and any even output. sit=True is SiT:
the same network with the second half of its output thrown away.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
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
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def normalized(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def adaptive(width, signals):
    return nn.Sequential(nn.SiLU(), nn.Linear(width, signals * width))


class Block(nn.Module):
    def __init__(self, width, heads, hidden):
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = Mlp(width, hidden)
        self.adaLN_modulation = adaptive(width, 6)

    def forward(self, x, c):
        b1, s1, g1, b2, s2, g2 = self.adaLN_modulation(c).chunk(6, -1)
        x = x + g1.unsqueeze(1) * self.attn(normalized(x, b1, s1))
        return x + g2.unsqueeze(1) * self.mlp(normalized(x, b2, s2))


class Final(nn.Module):
    def __init__(self, width, features):
        super().__init__()
        self.linear = nn.Linear(width, features)
        self.adaLN_modulation = adaptive(width, 2)

    def forward(self, x, c):
        return self.linear(normalized(x, *self.adaLN_modulation(c).chunk(2, -1)))


class Time(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        angle = t[:, None] * torch.exp(-math.log(10_000) * torch.arange(128, dtype=torch.float32) / 128)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], -1))


class Label(nn.Module):
    def __init__(self, rows, width):
        super().__init__()
        self.embedding_table = nn.Embedding(rows, width)

    def forward(self, label):
        return self.embedding_table(label)


class Patches(nn.Module):
    def __init__(self, channels, width, patch):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(self, x):
        return self.proj(x).flatten(2).mT


def positions(rows, columns, width):
    """Each of `rows * columns` patches: sines and cosines of its column, then of its row, a quarter of `width` each."""
    frequency = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row = torch.arange(rows, dtype=torch.float64).repeat_interleave(columns)
    column = torch.arange(columns, dtype=torch.float64).repeat(rows)
    angles = [position[:, None] * frequency for position in (column, row)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], -1).float()[None]


class DiT(nn.Module):
    def __init__(self, size, channels, out, width, depth, heads, patch, rows, hidden, sit=False):
        super().__init__()
        self.grid, self.patch, self.sit = [n // patch for n in size], patch, sit
        self.pos_embed = nn.Parameter(positions(*self.grid, width), requires_grad=False)
        self.x_embedder = Patches(channels, width, patch)
        self.t_embedder = Time(width)
        self.y_embedder = Label(rows, width)
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(depth))
        self.final_layer = Final(width, out * patch**2)

    def forward(self, x, t, y):
        c = self.t_embedder(t) + self.y_embedder(y)
        x = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            x = block(x, c)
        x = self.final_layer(x, c).unflatten(1, self.grid).unflatten(-1, (self.patch, self.patch, -1))
        x = x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)  # [B, C, h, p, w, p] -> [B, C, H, W]
        return x.chunk(2, 1)[0] if self.sit else x
