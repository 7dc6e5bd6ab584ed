"""EDM2's network in PyTorch, transcribed from Karras et al. 2024 (figure 21, appendix B) for the parity tests.

Parameters and buffers have the names of the published state dicts, so that `Precond(...).state_dict()` stands in for
one. Checked against the published implementation with random weights; the measured differences are in the commit that
added this file.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


def unit(x, dims, eps=1e-4):
    """x divided by (its root mean square over dims, plus eps)."""
    return x / (eps + x.float().square().mean(dims, keepdim=True).sqrt()).to(x.dtype)


def silu(x):
    return F.silu(x) / 0.596


def mix(a, b, t):
    return ((1 - t) * a + t * b) / math.sqrt(t * t + (1 - t) * (1 - t))


def join(a, b, t):
    n, m = a.shape[1], b.shape[1]
    scale = math.sqrt((n + m) / (t * t + (1 - t) * (1 - t)))
    return torch.cat([a * (scale * (1 - t) / math.sqrt(n)), b * (scale * t / math.sqrt(m))], 1)


class Fourier(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.register_buffer("freqs", torch.randn(features) * 2 * math.pi)
        self.register_buffer("phases", torch.rand(features) * 2 * math.pi)

    def forward(self, t):
        return math.sqrt(2) * torch.cos(t[:, None] * self.freqs + self.phases)


class Weights(nn.Module):
    """A convolution of size 1 or 3, or a matrix (size None)."""

    def __init__(self, n_in, n_out, size=None):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in, *(() if size is None else (size, size))))

    def forward(self, x, gain=1.0):
        dims = tuple(range(1, self.weight.ndim))
        if self.training:  # before the weights are used: what is stored has unit magnitude
            with torch.no_grad():
                self.weight.copy_(unit(self.weight, dims))
        w = unit(self.weight, dims) * gain / math.sqrt(self.weight[0].numel())
        return F.linear(x, w) if w.ndim == 2 else F.conv2d(x, w, padding=w.shape[-1] // 2)


class Block(nn.Module):
    def __init__(self, n_in, n_out, embedding, kind, size="keep", attends=False, *, channels_per_head=64, dropout=0.0,
                 res_balance=0.3, attn_balance=0.3, clip_act=256.0):  # fmt: skip
        super().__init__()
        self.kind, self.size, self.dropout = kind, size, dropout
        self.balances, self.clip_act, self.width = (res_balance, attn_balance), clip_act, n_out
        self.heads = n_out // channels_per_head if attends else 0
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = Weights(n_in if kind == "dec" else n_out, n_out, 3)
        self.emb_linear = Weights(embedding, n_out)
        self.conv_res1 = Weights(n_out, n_out, 3)
        self.conv_skip = None if n_in == n_out else Weights(n_in, n_out, 1)
        self.attn_qkv = Weights(n_out, 3 * n_out, 1) if self.heads else None
        self.attn_proj = Weights(n_out, n_out, 1) if self.heads else None

    def attend(self, x):
        b, c, h, w = x.shape
        # The channels of attn_qkv: head, then channel of the head, then which of q, k and v.
        qkv = unit(self.attn_qkv(x).reshape(b, self.heads, c // self.heads, 3, h * w), 2)
        q, k, v = (qkv[:, :, :, i].transpose(2, 3) for i in range(3))
        y = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]), -1) @ v
        return self.attn_proj(y.transpose(2, 3).reshape(b, c, h, w))

    def forward(self, x, embedding):
        if self.size == "down":
            x = F.avg_pool2d(x, 2)
        if self.size == "up":
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        if self.kind == "enc":
            x = unit(x if self.conv_skip is None else self.conv_skip(x), 1)
        y = self.conv_res0(silu(x))
        y = silu(y * (1 + self.emb_linear(embedding, self.emb_gain))[:, :, None, None])
        y = self.conv_res1(F.dropout(y, self.dropout, self.training))
        if self.kind == "dec" and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mix(x, y, self.balances[0])
        if self.heads:
            x = mix(x, self.attend(x), self.balances[1])
        return x if self.clip_act is None else x.clamp(-self.clip_act, self.clip_act)


class UNet(nn.Module):
    def __init__(self, img_resolution, img_channels, label_dim, model_channels=192, channel_mult=(1, 2, 3, 4),
                 channel_mult_noise=None, channel_mult_emb=None, num_blocks=3, attn_resolutions=(16, 8),
                 label_balance=0.5, concat_balance=0.5, **block):  # fmt: skip
        super().__init__()
        widths = [model_channels * m for m in channel_mult]
        sizes = [img_resolution // 2**i for i in range(len(widths))]
        noise = model_channels * channel_mult_noise if channel_mult_noise else widths[0]
        emb = model_channels * channel_mult_emb if channel_mult_emb else max(widths)
        self.balances = label_balance, concat_balance
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.emb_fourier, self.emb_noise = Fourier(noise), Weights(noise, emb)
        self.emb_label = Weights(label_dim, emb) if label_dim else None
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        width, skips = widths[0], [widths[0]]
        self.enc[f"{sizes[0]}x{sizes[0]}_conv"] = Weights(img_channels + 1, width, 3)
        for i, (size, wide) in enumerate(zip(sizes, widths, strict=True)):
            if i:
                self.enc[f"{size}x{size}_down"] = Block(width, width, emb, "enc", "down", **block)
                skips.append(width)
            for n in range(num_blocks):
                self.enc[f"{size}x{size}_block{n}"] = Block(
                    width, wide, emb, "enc", attends=size in attn_resolutions, **block
                )
                width = wide
                skips.append(width)
        for i, (size, wide) in reversed(list(enumerate(zip(sizes, widths, strict=True)))):
            if i == len(sizes) - 1:
                self.dec[f"{size}x{size}_in0"] = Block(width, width, emb, "dec", attends=True, **block)
                self.dec[f"{size}x{size}_in1"] = Block(width, width, emb, "dec", **block)
            else:
                self.dec[f"{size}x{size}_up"] = Block(width, width, emb, "dec", "up", **block)
            for n in range(num_blocks + 1):
                self.dec[f"{size}x{size}_block{n}"] = Block(
                    width + skips.pop(), wide, emb, "dec", attends=size in attn_resolutions, **block
                )
                width = wide
        self.out_conv = Weights(width, img_channels, 3)

    def forward(self, x, noise_labels, class_labels):
        e = self.emb_noise(self.emb_fourier(noise_labels))
        if self.emb_label is not None:
            e = mix(e, self.emb_label(class_labels * math.sqrt(class_labels.shape[1])), self.balances[0])
        e = silu(e)
        x, skips = torch.cat([x, torch.ones_like(x[:, :1])], 1), []
        for name, block in self.enc.items():
            x = block(x) if name.endswith("conv") else block(x, e)
            skips.append(x)
        for name, block in self.dec.items():
            x = block(join(x, skips.pop(), self.balances[1]) if "block" in name else x, e)
        return self.out_conv(x, self.out_gain)


class Precond(nn.Module):
    """D(x; sigma) and, where asked for, u(sigma)."""

    def __init__(self, img_resolution, img_channels, label_dim, sigma_data=0.5, logvar_channels=128, **unet):
        super().__init__()
        self.sigma_data, self.label_dim = sigma_data, label_dim
        self.unet = UNet(img_resolution, img_channels, label_dim, **unet)
        self.logvar_fourier = Fourier(logvar_channels)
        self.logvar_linear = Weights(logvar_channels, 1)

    def forward(self, x, sigma, class_labels=None, return_logvar=False):
        if self.label_dim and class_labels is None:
            class_labels = torch.zeros(1, self.label_dim)
        s, sd, t = sigma[:, None, None, None], self.sigma_data, sigma.log() / 4
        root = (s * s + sd * sd).sqrt()
        out = self.unet(x / root, t, class_labels)
        denoised = (sd / root) ** 2 * x + s * sd / root * out
        if not return_logvar:
            return denoised
        return denoised, self.logvar_linear(self.logvar_fourier(t))[:, :, None, None]
