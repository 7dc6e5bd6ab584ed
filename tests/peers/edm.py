"""EDM's networks and preconditioning in PyTorch, written from Karras et al. 2022 (table 1, appendix F.1) and Song et
al. 2021 (appendix H), under the parameter names of the published state dicts. Only what runs at sampling."""

import math

import torch
from torch import nn
from torch.nn import functional as F

HALF = math.sqrt(0.5)


class Weights(nn.Module):
    """weight and bias under these names, anywhere; values are the test's business."""

    def __init__(self, *shape, bias=True):
        super().__init__()
        self.weight = nn.Parameter(0.05 * torch.randn(shape))
        self.bias = nn.Parameter(torch.zeros(shape[0])) if bias else None


class Linear(Weights):
    def __init__(self, cin, cout, bias=True):
        super().__init__(cout, cin, bias=bias)

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Norm(nn.GroupNorm):
    def __init__(self, channels, eps):
        super().__init__(min(32, channels // 4), channels, eps)


class Conv(nn.Module):
    """A convolution, a change of size, or one before the other. after: filter after the convolution, whose padding
    reaches over the filter's edge (the residual pyramid)."""

    def __init__(self, cin, cout, kernel, *, up=False, down=False, taps=(1, 1), after=False):
        super().__init__()
        if kernel:
            self.weight = nn.Parameter(torch.randn(cout, cin, kernel, kernel) / math.sqrt(cin * kernel**2))
            self.bias = nn.Parameter(torch.zeros(cout))
        self.kernel, self.up, self.down, self.after = kernel, up, down, after
        if up or down:
            f = torch.tensor(taps, dtype=torch.float32)
            self.register_buffer("resample_filter", torch.outer(f, f)[None, None] / f.sum() ** 2)

    def filter(self, x, padding):
        channels = x.shape[1]
        f = self.resample_filter.repeat(channels, 1, 1, 1)
        if self.up:
            return F.conv_transpose2d(x, 4 * f, stride=2, padding=padding, groups=channels)
        return F.conv2d(x, f, stride=2, padding=padding, groups=channels)

    def forward(self, x):
        overhang = self.resample_filter.shape[-1] // 2 - 1 if self.up or self.down else 0
        if self.after:
            x = F.conv2d(x, self.weight, padding=self.kernel // 2 + overhang)
            return self.filter(x, 0) + self.bias[:, None, None]
        if self.up or self.down:
            x = self.filter(x, overhang)
        return F.conv2d(x, self.weight, self.bias, padding=self.kernel // 2) if self.kernel else x


class UNetBlock(nn.Module):
    def __init__(self, cin, cout, emb, *, up=False, down=False, heads=0, taps=(1, 1), project=False, scale_shift=True,
                 skip_scale=1.0, eps=1e-5):  # fmt: skip
        super().__init__()
        size = {"up": up, "down": down, "taps": taps}
        self.cin, self.heads, self.scale_shift, self.skip_scale = cin, heads, scale_shift, skip_scale
        self.norm0, self.conv0 = Norm(cin, eps), Conv(cin, cout, 3, **size)
        self.affine = Linear(emb, cout * (1 + scale_shift))
        self.norm1, self.conv1 = Norm(cout, eps), Conv(cout, cout, 3)
        self.skip = None
        if cin != cout or up or down:
            self.skip = Conv(cin, cout, 1 if project or cin != cout else 0, **size)
        if heads:
            self.norm2, self.qkv, self.proj = Norm(cout, eps), Conv(cout, 3 * cout, 1), Conv(cout, cout, 1)

    def forward(self, x, emb):
        h = self.conv0(F.silu(self.norm0(x)))
        e = self.affine(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = e.chunk(2, 1)
            h = self.norm1(h) * (1 + scale) + shift
        else:
            h = self.norm1(h + e)
        h = self.conv1(F.silu(h))
        x = self.skip_scale * (h + (x if self.skip is None else self.skip(x)))
        if self.heads:
            b, c, height, width = x.shape
            # A head's channels are each a triple of query, key and value.
            qkv = self.qkv(self.norm2(x)).reshape(b, self.heads, c // self.heads, 3, height * width)
            q, k, v = qkv.transpose(2, 4).unbind(3)
            a = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(x.shape)
            x = self.skip_scale * (x + self.proj(a))
        return x


class Fourier(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.register_buffer("freqs", 16 * torch.randn(features // 2))

    def forward(self, t):
        angle = t[:, None] * (2 * math.pi * self.freqs)
        return torch.cat([angle.cos(), angle.sin()], 1)


class Positional(nn.Module):
    def __init__(self, features, endpoint):
        super().__init__()
        half = features // 2
        self.freqs = 10_000 ** -(torch.arange(half, dtype=torch.float32) / (half - endpoint))

    def forward(self, t):
        angle = t[:, None] * self.freqs
        return torch.cat([angle.cos(), angle.sin()], 1)


class SongUNet(nn.Module):
    def __init__(self, img_resolution, in_channels, out_channels, label_dim=0, augment_dim=0, model_channels=128,
                 channel_mult=(1, 2, 2, 2), channel_mult_emb=4, num_blocks=4, attn_resolutions=(16,),
                 embedding_type="positional", channel_mult_noise=1, encoder_type="standard", decoder_type="standard",
                 resample_filter=(1, 1)):  # fmt: skip
        super().__init__()
        taps, noise, emb = resample_filter, model_channels * channel_mult_noise, model_channels * channel_mult_emb

        def block(cin, cout, heads=0, **size):
            return UNetBlock(cin, cout, emb, heads=heads, taps=taps, project=True, scale_shift=False, skip_scale=HALF,
                             eps=1e-6, **size)  # fmt: skip

        self.map_noise = Fourier(noise) if embedding_type == "fourier" else Positional(noise, endpoint=True)
        self.map_label = Linear(label_dim, noise) if label_dim else None
        self.map_augment = Linear(augment_dim, noise, bias=False) if augment_dim else None
        self.map_layer0, self.map_layer1 = Linear(noise, emb), Linear(emb, emb)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        width, pyramid, skips = model_channels, in_channels, []
        for level, mult in enumerate(channel_mult):
            res = img_resolution >> level
            name = f"{res}x{res}"
            if level == 0:
                self.enc[f"{name}_conv"] = Conv(in_channels, width, 3)
            else:
                self.enc[f"{name}_down"] = block(width, width, down=True)
                if encoder_type == "skip":
                    self.enc[f"{name}_aux_down"] = Conv(pyramid, pyramid, 0, down=True, taps=taps)
                    self.enc[f"{name}_aux_skip"] = Conv(pyramid, width, 1)
                if encoder_type == "residual":
                    self.enc[f"{name}_aux_residual"] = Conv(pyramid, width, 3, down=True, taps=taps, after=True)
                    pyramid = width
            skips.append(width)
            for i in range(num_blocks):
                self.enc[f"{name}_block{i}"] = block(width, model_channels * mult, int(res in attn_resolutions))
                width = model_channels * mult
                skips.append(width)
        for level, mult in reversed(list(enumerate(channel_mult))):
            res = img_resolution >> level
            name, coarsest = f"{res}x{res}", level == len(channel_mult) - 1
            if coarsest:
                self.dec[f"{name}_in0"], self.dec[f"{name}_in1"] = block(width, width, 1), block(width, width)
            else:
                self.dec[f"{name}_up"] = block(width, width, up=True)
            for i in range(num_blocks + 1):
                heads = int(i == num_blocks and res in attn_resolutions)
                self.dec[f"{name}_block{i}"] = block(width + skips.pop(), model_channels * mult, heads)
                width = model_channels * mult
            if decoder_type == "skip" or level == 0:
                if decoder_type == "skip" and not coarsest:
                    self.dec[f"{name}_aux_up"] = Conv(out_channels, out_channels, 0, up=True, taps=taps)
                self.dec[f"{name}_aux_norm"] = Norm(width, 1e-6)
                self.dec[f"{name}_aux_conv"] = Conv(width, out_channels, 3)

    def embed(self, noise_labels, class_labels, augment_labels):
        cos, sin = self.map_noise(noise_labels).chunk(2, 1)
        e = torch.cat([sin, cos], 1)
        if self.map_label is not None:
            e = e + self.map_label(class_labels * math.sqrt(class_labels.shape[1]))
        if self.map_augment is not None and augment_labels is not None:
            e = e + self.map_augment(augment_labels)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(e))))

    def forward(self, x, noise_labels, class_labels=None, augment_labels=None):
        emb = self.embed(noise_labels, class_labels, augment_labels)
        skips, pyramid = [], x
        for name, module in self.enc.items():
            if "aux_down" in name:
                pyramid = module(pyramid)
            elif "aux_skip" in name:
                x = skips[-1] = x + module(pyramid)
            elif "aux_residual" in name:
                x = skips[-1] = pyramid = HALF * (x + module(pyramid))
            else:
                x = module(x, emb) if isinstance(module, UNetBlock) else module(x)
                skips.append(x)
        image = 0
        for name, module in self.dec.items():
            if "aux_up" in name:
                image = module(image)
            elif "aux_norm" in name:
                h = F.silu(module(x))
            elif "aux_conv" in name:
                image = image + module(h)
            else:
                x = module(x if "block" not in name else torch.cat([x, skips.pop()], 1), emb)
        return image


class DhariwalUNet(nn.Module):
    def __init__(self, img_resolution, in_channels, out_channels, label_dim=0, augment_dim=0, model_channels=192,
                 channel_mult=(1, 2, 3, 4), channel_mult_emb=4, num_blocks=3,
                 attn_resolutions=(32, 16, 8)):  # fmt: skip
        super().__init__()
        emb = model_channels * channel_mult_emb

        def block(cin, cout, attends=False, **size):
            return UNetBlock(cin, cout, emb, heads=cout // 64 if attends else 0, **size)

        self.map_noise = Positional(model_channels, endpoint=False)
        self.map_augment = Linear(augment_dim, model_channels, bias=False) if augment_dim else None
        self.map_layer0, self.map_layer1 = Linear(model_channels, emb), Linear(emb, emb)
        self.map_label = Linear(label_dim, emb, bias=False) if label_dim else None
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        width, skips = model_channels * channel_mult[0], []
        for level, mult in enumerate(channel_mult):
            res = img_resolution >> level
            first = Conv(in_channels, width, 3) if level == 0 else block(width, width, down=True)
            self.enc[f"{res}x{res}_{'down' if level else 'conv'}"] = first
            skips.append(width)
            for i in range(num_blocks):
                self.enc[f"{res}x{res}_block{i}"] = block(width, model_channels * mult, res in attn_resolutions)
                width = model_channels * mult
                skips.append(width)
        for level, mult in reversed(list(enumerate(channel_mult))):
            res = img_resolution >> level
            if level == len(channel_mult) - 1:
                self.dec[f"{res}x{res}_in0"], self.dec[f"{res}x{res}_in1"] = (
                    block(width, width, True),
                    block(width, width),
                )
            else:
                self.dec[f"{res}x{res}_up"] = block(width, width, up=True)
            for i in range(num_blocks + 1):
                self.dec[f"{res}x{res}_block{i}"] = block(
                    width + skips.pop(), model_channels * mult, res in attn_resolutions
                )
                width = model_channels * mult
        self.out_norm, self.out_conv = Norm(width, 1e-5), Conv(width, out_channels, 3)

    def forward(self, x, noise_labels, class_labels=None, augment_labels=None):
        e = self.map_noise(noise_labels)
        if self.map_augment is not None and augment_labels is not None:
            e = e + self.map_augment(augment_labels)
        e = self.map_layer1(F.silu(self.map_layer0(e)))
        if self.map_label is not None:
            e = e + self.map_label(class_labels)
        emb, skips = F.silu(e), []
        for module in self.enc.values():
            x = module(x, emb) if isinstance(module, UNetBlock) else module(x)
            skips.append(x)
        for name, module in self.dec.items():
            x = module(x if "block" not in name else torch.cat([x, skips.pop()], 1), emb)
        return self.out_conv(F.silu(self.out_norm(x)))


class Precond(nn.Module):
    """D(x; sigma) of table 1 around `model`: columns "edm", "vp", "ve" and "iddpm"."""

    def __init__(self, model, kind="edm", sigma_data=0.5):
        super().__init__()
        self.model, self.kind, self.sigma_data = model, kind, sigma_data
        if kind == "iddpm":  # eq. 173: the noise levels of the cosine schedule, from most to none
            bar = torch.sin(torch.arange(1001) / 1000 / 1.008 * math.pi / 2) ** 2
            u = torch.zeros(1001)
            for j in range(1000, 0, -1):
                u[j - 1] = ((u[j] ** 2 + 1) / max(bar[j - 1] / bar[j], 0.001) - 1).sqrt()
            self.register_buffer("u", u)

    def coefficients(self, s):
        """c_skip, c_out, c_in, c_noise at noise levels s [B]."""
        d, one = self.sigma_data, torch.ones_like(s)
        if self.kind == "edm":
            norm = (s**2 + d**2).sqrt()
            return d**2 / norm**2, s * d / norm, 1 / norm, s.log() / 4
        if self.kind == "ve":
            return one, s, one, (s / 2).log()
        if self.kind == "vp":
            t = ((0.1**2 + 2 * 19.9 * (1 + s**2).log()).sqrt() - 0.1) / 19.9
            return one, -s, 1 / (s**2 + 1).sqrt(), 999 * t
        nearest = (s[:, None] - self.u[None]).abs().argmin(1)
        return one, -s, 1 / (s**2 + 1).sqrt(), (999 - nearest).float()

    def forward(self, x, sigma, class_labels=None):
        skip, out, scale, noise = self.coefficients(sigma)
        skip, out, scale = (c[:, None, None, None] for c in (skip, out, scale))
        return skip * x + out * self.model(scale * x, noise, class_labels)[:, : x.shape[1]]
