"""PyTorch's side: the same work in every form that may be the fastest (variants.py).

On GPUs also cudnn.benchmark, TF32 for float32, and CUDA graphs: reduce-overhead's and max-autotune's by torch.compile,
and with `cuda_graph` the whole step, or the whole loop of the sampler, as one.
"""

import contextlib
import copy
import functools
import gc
import importlib.metadata
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from jax_diffusion.bench import cases, torch_networks, torch_sample, torch_train, worker
from jax_diffusion.bench.variants import VARIANTS, Variant
from jax_diffusion.errors import UserError


class Side:
    """What the parent calls, see worker.py."""

    def __init__(self, threads: int, folder: pathlib.Path):
        self.folder, self.threads = folder, threads
        # What torch.compile keeps is this run's own, so that the time it takes is told.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
        torch.set_num_threads(threads)
        self.prepared: dict[str, Callable[[int], None]] = {}
        self.work: cases.Work | None = None

    def start(self, platform: str = "cpu") -> dict[str, Any]:
        """platform: JAX's."""
        if platform != "cpu" and not torch.cuda.is_available():
            raise UserError(
                f"JAX runs on {platform} and this PyTorch ({torch.__version__}) has no CUDA: install one that has, use "
                "--only=jax, or set JAX_PLATFORMS=cpu"
            )
        self.device = torch.device("cpu" if platform == "cpu" else "cuda")
        versions = {"torch": torch.__version__}
        if platform != "cpu":
            torch.backends.cudnn.benchmark = True
            torch.backends.cudnn.allow_tf32 = True
            torch.set_float32_matmul_precision("high")
            versions |= {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
        for package in ("diffusers", "denoising_diffusion_pytorch"):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[package] = importlib.metadata.version(package)
        name = "cpu" if platform == "cpu" else torch.cuda.get_device_name()
        return {"device": name, "versions": versions, "threads": torch.get_num_threads()}

    def ceiling(self, size: int, dtype: str, seconds: float) -> float:
        """FLOP/s of one large square matrix product."""
        a = torch.randn(size, size, device=self.device).to(getattr(torch, dtype))
        out = torch.empty_like(a)

        def run():
            for _ in range(4):
                torch.mm(a, a, out=out)
            self._wait()

        run()
        return 4 * 2 * size**3 / min(worker.clock(run, seconds / 5) for _ in range(5))

    def load(self, **work: Any) -> dict[str, Any]:
        """Reads what JAX's worker has left in the folder."""
        before, self.work = self.work, cases.Work(**work)
        if before is None or not before.same_network(self.work):
            self.spec = json.loads((self.folder / "spec.json").read_text())
            self.dtype = getattr(torch, self.work.dtype)
            self.network = torch_networks.load(self.folder)
        return {"parameters": sum(p.numel() for p in self.network.parameters())}

    def variants(self, mode: str) -> list[str]:
        known = VARIANTS[mode]
        mine = self.work.case == "ddpm_pytorch"
        return [
            name
            for name, v in known.items()
            if (self.device.type == "cuda" or not v.gpu)
            and (mine or v.loop != "package")
            and not (mine and v.loop == "pipeline")
            and (name != "eager_channels_last" or self.work.convolves)
        ]

    def _layout(self, v: Variant):
        return torch.channels_last if v.channels_last and self.work.convolves else torch.contiguous_format

    def _net(self, v: Variant, *, training: bool):
        net = copy.deepcopy(self.network).to(self.device).to(memory_format=self._layout(v)).train(training)
        return torch_networks.halved(net) if not training and self.dtype is torch.bfloat16 else net

    def _compiled(self, function, v: Variant):
        if v.compile is None:
            return function
        torch._dynamo.reset()
        return torch.compile(function, mode=v.compile, dynamic=False)

    def _tensors(self, batch: int, layout) -> dict[str, torch.Tensor]:
        out = {}
        for name, array in cases.inputs(self.work, batch).items():
            tensor = torch.from_numpy(array)
            if array.ndim == 4:
                tensor = tensor.permute(0, 3, 1, 2).contiguous(memory_format=layout)
            out[name] = (tensor.long() if name in ("t", "label") else tensor).to(self.device)
        return out

    def _autocast(self, cached: bool = True):
        """cached=False for CUDA graphs, which would go on reading the copies of weights that autocast lets go of."""
        enabled = self.dtype is torch.bfloat16
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled, cache_enabled=cached)

    def check(self, batch: int) -> str:
        """The network's output and the loss on cases.inputs, as a file."""
        v = Variant(channels_last=False)
        net, given = self._net(v, training=True).eval(), self._tensors(batch, torch.contiguous_format)
        loss = torch_train.Loss(net, self.spec, self.dtype).to(self.device)
        x0 = given["x0"] if given["x0"].is_floating_point() else (given["x0"].float() - 127.5) / 127.5
        with torch.inference_mode():
            losses, output = loss.of(x0, given["label"], given["t"], given["noise"])
        return self._save("check", output=_nhwc(output), loss=losses)

    def prepare(self, key: str, mode: str, variant: str, batch: int, warmup: int) -> dict[str, Any]:
        """Compiles and warms up `mode`. Returns seconds to compile and seconds a step."""
        make = {"train": self._train, "forward": self._forward, "sample": self._sample}[mode]
        started = time.perf_counter()
        run = make(batch, VARIANTS[mode][variant])
        run(1)
        first = time.perf_counter() - started
        run(max(warmup, 1))
        again = time.perf_counter()
        run(1)
        again = time.perf_counter() - again
        self.prepared[key] = run
        return {"compile_s": max(first - again, 0.0), "step_s": again, "per_call": 1}

    def _train(self, batch: int, v: Variant):
        net, given = self._net(v, training=True), self._tensors(batch, self._layout(v))
        if v.loop == "package":
            step: Any = torch_train.PackageStep(torch_train.package_diffusion(net, self.spec), self.spec, self.dtype)
        else:
            loss = torch_train.Loss(net, self.spec, self.dtype).to(self.device)
            step = torch_train.Step(loss, self.spec, self._compiled(loss, v), v.marks, v.graph)
        once: Callable[[], None] = functools.partial(step, given["x0"], given["label"])
        if v.graph:
            once = torch_train.captured(once)

        def run(n: int) -> None:
            for _ in range(n):
                once()
            self._wait()
            if not bool(torch.isfinite(step.loss)):
                raise FloatingPointError("the loss is not finite")

        return run

    def _forward(self, batch: int, v: Variant):
        net, given = self._net(v, training=False), self._tensors(batch, self._layout(v))
        call = self._compiled(net, v)
        arguments = given["x"], given["t"], given["label"]

        def once() -> None:
            if v.marks:
                torch.compiler.cudagraph_mark_step_begin()
            with torch.inference_mode(), self._autocast(cached=not v.graph):
                self.last = call(*arguments)

        replay = torch_train.captured(once) if v.graph else once

        def run(n: int) -> None:
            for _ in range(n):
                replay()
            self._wait()

        return run

    def _sample(self, batch: int, v: Variant):
        net, label = self._net(v, training=False), self._tensors(batch, torch.contiguous_format)["label"]
        if v.loop == "package":
            sample = torch_sample.package(torch_train.package_diffusion(net, self.spec), self.spec, batch)
        elif v.loop == "pipeline":
            sample = torch_sample.pipeline(net, self._compiled(net, v), self.spec, batch, label, self.device)
        else:
            update = torch_sample.Update(net, self.spec).to(self.device)
            rest = (self._compiled(update, v), self.spec, batch, label, self.device, self._layout(v))
            with self._autocast(cached=not v.graph):
                sample = torch_sample.one_graph(*rest) if v.graph else torch_sample.tuned(*rest, marks=v.marks)

        def run(n: int, begin=None) -> None:
            for _ in range(n):
                with self._autocast():
                    self.last = sample(begin)
            self._wait()

        self.sample = run
        return run

    def output(self, key: str, begin: str = "") -> str:
        """The last output of what was prepared last; begin: a file with the noise that its samples begin with."""
        if begin:
            with np.load(begin) as arrays:
                x = torch.from_numpy(arrays["begin"]).permute(0, 3, 1, 2).contiguous().to(self.device)
            self.sample(1, x)
        return self._save("output", output=_nhwc(self.last))

    def run(self, key: str, steps: int) -> float:
        started = time.perf_counter()
        self.prepared[key](steps)
        return time.perf_counter() - started

    def restart_peak(self) -> None:
        worker.restart_peak()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        """Bytes since `restart_peak`: of the GPU, else of this process."""
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else worker.peak_memory()

    def drop(self, key: str) -> None:
        """Lets go of everything of a variant."""
        self.prepared.pop(key, None)
        self.sample = self.last = None  # type: ignore[assignment]
        torch._dynamo.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _save(self, name: str, **arrays: torch.Tensor) -> str:
        path = self.folder / f"torch_{name}.npz"
        np.savez(path, **{k: v.detach().float().cpu().numpy() for k, v in arrays.items()})
        return str(path)


def _nhwc(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1)
