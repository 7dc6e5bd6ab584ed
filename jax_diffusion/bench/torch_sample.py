"""PyTorch's 50 steps of DDIM: as diffusers' users write them, and as one would for speed."""

import contextlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn


def labels_and_null(spec: dict[str, Any], label: torch.Tensor) -> torch.Tensor:
    """The labels of one evaluation: with guidance those of its unconditional half behind them."""
    if spec["guidance"] == 1:
        return label
    return torch.cat([label, torch.full_like(label, spec["num_classes"])])


def guided(net: Callable, spec: dict[str, Any], x, t, label):
    """The noise prediction; with guidance from one evaluation of twice the batch, as in DiTPipeline."""
    scale = spec["guidance"]
    out = net(torch.cat([x, x]) if scale != 1 else x, t, label).float()
    if spec["learn_variance"]:
        out = out.chunk(2, dim=1)[0]
    if scale == 1:
        return out
    cond, null = out.chunk(2)
    return null + scale * (cond - null)


def scheduler_of(spec: dict[str, Any]):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        num_train_timesteps=len(spec["betas"]),
        trained_betas=np.asarray(spec["betas"], np.float32),
        clip_sample=spec["clip"],
        timestep_spacing="leading",
    )
    scheduler.set_timesteps(len(spec["times"]))
    if scheduler.timesteps.tolist() != [round(t) for t in spec["times"]]:
        raise ValueError("diffusers' DDIMScheduler has other times than --config.sampling.grid")
    return scheduler


def pipeline(net: nn.Module, call: Callable, spec: dict[str, Any], batch: int, label, device) -> Callable:
    """diffusers' own loop: DDIMPipeline where it fits, else DDIMScheduler in the loop that DiTPipeline has.

    call: `net`, perhaps compiled.  Returns sample(begin=None) -> [B, C, H, W] float32 in [-1, 1] on the host.
    """
    scheduler, shape = scheduler_of(spec), (batch, spec["shape"][-1], *spec["shape"][:2])
    steps = len(spec["times"])
    if not spec["num_classes"] and spec["guidance"] == 1 and not spec["learn_variance"] and spec["clip"]:
        import diffusers.pipelines.ddim.pipeline_ddim as module

        whole = module.DDIMPipeline(net.net, scheduler)
        if call is not net:
            whole.unet.forward = torch.compile(whole.unet.forward, dynamic=False)
        whole.set_progress_bar_config(disable=True)

        def sample(begin=None):
            given: contextlib.AbstractContextManager = contextlib.nullcontext()
            if begin is not None:
                given = mock.patch.object(module, "randn_tensor", lambda *a, **k: begin)
            with given:
                images = whole(batch_size=batch, num_inference_steps=steps, output_type="np").images
            return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1

        return sample

    both = labels_and_null(spec, label)

    @torch.no_grad()
    def loop(begin=None):
        x = torch.randn(shape, device=device) if begin is None else begin
        for t in scheduler.timesteps:
            noise = guided(call, spec, x, t.to(device), both)
            x = scheduler.step(noise, t, x).prev_sample
        return x.float().cpu()

    return loop


class Update(nn.Module):
    """One step of DDIM: the network and its update in one graph, the coefficients looked up on the device."""

    def __init__(self, net: nn.Module, spec: dict[str, Any]):
        super().__init__()
        self.net, self.spec = net, spec
        bar = np.append(np.cumprod(1 - np.asarray(spec["betas"])), 1.0)  # the last row is clean
        times = np.round(np.asarray(spec["times"])).astype(int)
        now, then = bar[times], bar[np.append(times[1:], -1)]
        rows = np.stack([np.sqrt(now), np.sqrt(1 - now), np.sqrt(then), np.sqrt(1 - then)], axis=1)
        self.register_buffer("rows", torch.tensor(rows, dtype=torch.float32))
        self.register_buffer("times", torch.tensor(times))

    def forward(self, x, i, label):
        # i is [1]: an index of no axes would be read back from the device.
        alpha, sigma, alpha_next, sigma_next = self.rows.index_select(0, i)[0].unbind()
        t = self.times.index_select(0, i).expand(len(x) * (2 if self.spec["guidance"] != 1 else 1))
        noise = guided(self.net, self.spec, x, t, label)
        x0 = (x - sigma * noise) / alpha
        if self.spec["clip"]:
            x0 = x0.clamp(-1, 1)
            if self.spec["clipped_epsilon"]:
                noise = (x - alpha * x0) / sigma
        return alpha_next * x0 + sigma_next * noise


def tuned(update: Callable, spec: dict[str, Any], batch: int, label, device, layout, marks: bool) -> Callable:
    """The loop without a scheduler. update: an Update, perhaps compiled."""
    shape, both = (batch, spec["shape"][-1], *spec["shape"][:2]), labels_and_null(spec, label)
    indices = [torch.tensor([i], device=device) for i in range(len(spec["times"]))]

    @torch.inference_mode()
    def sample(begin=None):
        x = torch.randn(shape, device=device) if begin is None else begin.clone()
        x = x.contiguous(memory_format=layout)
        for i in indices:
            if marks:
                torch.compiler.cudagraph_mark_step_begin()
                x = x.clone()  # the graph's own output would be overwritten under it
            x = update(x, i, both)
        return x.float().cpu()

    return sample


def one_graph(update: Callable, spec: dict[str, Any], batch: int, label, device, layout) -> Callable:
    """All steps as one CUDA graph."""
    shape, both = (batch, spec["shape"][-1], *spec["shape"][:2]), labels_and_null(spec, label)
    indices = [torch.tensor([i], device=device) for i in range(len(spec["times"]))]
    with torch.inference_mode():
        first = torch.zeros(shape, device=device).contiguous(memory_format=layout)

        def whole():
            x = first
            for i in indices:
                x = update(x, i, both)
            return x

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            whole()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            last = whole()

    @torch.inference_mode()
    def sample(begin=None):
        if begin is None:
            first.normal_()
        else:
            first.copy_(begin)
        graph.replay()
        return last.float().cpu()

    return sample


def package(diffusion: nn.Module, spec: dict[str, Any], batch: int) -> Callable:
    """denoising_diffusion_pytorch's own ddim_sample."""
    import denoising_diffusion_pytorch.denoising_diffusion_pytorch as module

    shape = (batch, spec["shape"][-1], *spec["shape"][:2])

    def sample(begin=None):
        given: contextlib.AbstractContextManager = contextlib.nullcontext()
        if begin is not None:
            given = mock.patch.object(module.torch, "randn", lambda *a, **k: begin)
        with given, mock.patch.object(module, "tqdm", lambda pairs, **_: pairs):
            return diffusion.sample(batch_size=batch).float().cpu() * 2 - 1

    assert shape[1] == diffusion.channels
    return sample
