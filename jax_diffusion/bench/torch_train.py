"""PyTorch's training step, written as one would for speed.

uint8 data on the device; flips, times and noise drawn in the compiled part; autocast; one fused AdamW; the average of
the weights in one foreach call; nothing is read back from the device. The loss is that of process.py: the error of
epsilon, and with a learned variance 0.001 T times the variational bound (Nichol & Dhariwal 2021, section 3.1).
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn


class Loss(nn.Module):
    """forward(x0, label) -> [] loss with fresh times and noise; `of` is that of given ones."""

    def __init__(self, net: nn.Module, spec: dict[str, Any], dtype: torch.dtype):
        super().__init__()
        self.net, self.spec, self.dtype = net, spec, dtype
        betas = np.asarray(spec["betas"])
        bar = np.cumprod(1 - betas)
        before = np.append(1.0, bar[:-1])
        tilde = betas[1:] * (1 - bar[:-1]) / (1 - bar[1:])
        tables = {
            "alpha": np.sqrt(bar),
            "sigma": np.sqrt(1 - bar),
            "low": np.log(np.append(tilde[0], tilde)),
            "high": np.log(betas),
            # mean of q(x_{t-1} | x_t, x_0), DDPM's eq. 7
            "of_x0": betas * np.sqrt(before) / (1 - bar),
            "of_x": np.sqrt(1 - betas) * (1 - before) / (1 - bar),
        }
        for name, table in tables.items():
            self.register_buffer(name, torch.tensor(table, dtype=torch.float32), persistent=False)

    def forward(self, x0, label):
        s = self.spec
        b = x0.shape[0]
        if not x0.is_floating_point():
            x0 = (x0.float() - 127.5) / 127.5
        if s["flip"]:
            x0 = torch.where(torch.rand(b, 1, 1, 1, device=x0.device) < 0.5, x0.flip(-1), x0)
        if s["label_dropout"]:
            dropped = torch.rand(b, device=x0.device) < s["label_dropout"]
            label = torch.where(dropped, s["num_classes"], label)
        t = torch.randint(0, len(self.alpha), (b,), device=x0.device)
        return self.of(x0, label, t, torch.randn_like(x0))[0].mean()

    def of(self, x0, label, t, noise):
        """(loss [B], the network's output), x0 in [-1, 1]."""
        x_t = self._at("alpha", t) * x0 + self._at("sigma", t) * noise
        with torch.autocast(x0.device.type, torch.bfloat16, enabled=self.dtype is torch.bfloat16):
            output = self.net(x_t, t, label).float()
        if not self.spec["learn_variance"]:
            return (output - noise).square().mean((1, 2, 3)), output
        epsilon, v = output.chunk(2, dim=1)
        simple = (epsilon - noise).square().mean((1, 2, 3))
        bound = self._bound(x0, x_t, epsilon.detach(), (v + 1) / 2, t)
        return simple + 0.001 * len(self.alpha) * bound, output

    def _at(self, name: str, t):
        return getattr(self, name)[t][:, None, None, None]

    def _bound(self, x0, x_t, epsilon, v, t):
        x0_hat = (x_t - self._at("sigma", t) * epsilon) / self._at("alpha", t)
        low, high = self._at("low", t), self._at("high", t)
        log_var = v * high + (1 - v) * low
        mean, mean_hat = (self._at("of_x0", t) * x + self._at("of_x", t) * x_t for x in (x0, x0_hat))
        kl = 0.5 * (log_var - low - 1 + torch.exp(low - log_var) + (mean - mean_hat).square() * torch.exp(-log_var))
        nll = _decoder(x0, x0_hat, log_var)
        return torch.where((t == 0)[:, None, None, None], nll, kl).mean((1, 2, 3)) / math.log(2)


def _decoder(x0, mean, log_var):
    """-log of the mass on x0's 8-bit bin (DDPM, eq. 13), from the smaller tail."""
    inv_std = torch.exp(-0.5 * log_var)
    upper, lower = inv_std * (x0 - mean + 1 / 255), inv_std * (x0 - mean - 1 / 255)
    flip = lower > 0
    log_hi = torch.special.log_ndtr(torch.where(flip, -lower, upper))
    log_lo = torch.special.log_ndtr(torch.where(flip, -upper, lower))
    inner = log_hi + torch.log1p(-torch.exp(torch.clamp(log_lo - log_hi, max=-1e-7)))
    ends = torch.where(x0 > 0.999, torch.special.log_ndtr(-lower), inner)
    return -torch.where(x0 < -0.999, torch.special.log_ndtr(upper), ends)


class Step:
    """One step at a call; the loss stays on the device as `loss`."""

    def __init__(self, loss: Loss, spec: dict[str, Any], compiled: Callable, marks: bool, graph: bool):
        o = spec["optim"]
        self.net, self.compiled, self.marks, self.count = loss.net, compiled, marks, 0
        self.params = [p for p in loss.net.parameters() if p.requires_grad]
        cuda = self.params[0].is_cuda
        self.optimizer = torch.optim.AdamW(
            self.params, lr=o["learning_rate"], betas=(o["b1"], o["b2"]), eps=o["eps"], weight_decay=0.0, fused=True,
            capturable=cuda,
        )  # fmt: skip
        self.ema = [p.detach().clone() for p in self.params]
        self.clip, self.decay, self.warms = o["clip"], spec["ema"]["decay"], spec["ema"]["warmup"] and not graph
        self.loss = None

    def __call__(self, x0, label) -> None:
        if self.marks:  # the last step's graphs may be overwritten
            torch.compiler.cudagraph_mark_step_begin()
        loss = self.compiled(x0, label)
        loss.backward()
        if self.clip:
            nn.utils.clip_grad_norm_(self.params, self.clip, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        n, self.count = self.count, self.count + 1
        decay = min(self.decay, (1 + n) / (10 + n)) if self.warms else self.decay
        torch._foreach_lerp_(self.ema, [p.detach() for p in self.params], 1 - decay)
        self.loss = loss.detach()


class PackageStep:
    """What denoising_diffusion_pytorch's Trainer does in a step, without its data loader: Adam, clipping, and an
    average of the weights every tenth step."""

    def __init__(self, diffusion: nn.Module, spec: dict[str, Any], dtype: torch.dtype):
        from ema_pytorch import EMA

        self.model, self.dtype = diffusion, dtype
        self.optimizer = torch.optim.Adam(diffusion.parameters(), lr=spec["optim"]["learning_rate"], betas=(0.9, 0.99))
        self.ema = EMA(diffusion, beta=0.995, update_every=10)
        self.ema.to(next(diffusion.parameters()).device)
        self.loss = None

    def __call__(self, x0, label) -> None:
        self.model.train()
        images = x0.float() / 255
        with torch.autocast(x0.device.type, torch.bfloat16, enabled=self.dtype is torch.bfloat16):
            loss = self.model(images)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update()
        self.loss = loss.detach()


def package_diffusion(net: nn.Module, spec: dict[str, Any]) -> nn.Module:
    """GaussianDiffusion around lucidrains' Unet, for the process that JAX's side has."""
    from denoising_diffusion_pytorch import GaussianDiffusion

    diffusion = GaussianDiffusion(
        net.net,
        image_size=spec["shape"][0],
        timesteps=len(spec["betas"]),
        sampling_timesteps=len(spec["times"]),
        objective="pred_noise",
        beta_schedule=spec["schedule"],
    )
    return diffusion.to(next(net.parameters()).device)


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """The whole step as one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
