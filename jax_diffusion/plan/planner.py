"""Compiles a run's programs for a topology and reads them: one plan, a search for the batch, a sweep over meshes."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax

from jax_diffusion import config as configs
from jax_diffusion import sharding
from jax_diffusion.models.transformer import REMAT
from jax_diffusion.plan import cost, programs, search, targets
from jax_diffusion.train import flops


class Planner:
    """Of one config on one topology. `stage(text, of)` is told what is compiled next, and of how many."""

    def __init__(
        self,
        topology: str,
        config: configs.ConfigDict,
        shape: tuple[int, ...],
        classes: int,
        *,
        cache: pathlib.Path | None = None,
        stage: Callable[..., None] = lambda text, of=None: None,
    ):
        self.topology, self.config, self.shape, self.classes = topology, config, tuple(shape), classes
        self.cache, self.stage = cache, stage
        self.chip = targets.parse(topology).chip
        self.devices = targets.devices(topology)
        dtype = config.model.get("dtype", "float32")
        self.peak = flops.peak(self.chip.kinds[0], dtype) if self.chip else None

    def mesh(self, sizes: dict[str, int]) -> jax.sharding.Mesh:
        return sharding.make_mesh(**sizes, devices=self.devices)

    def _with(self, sizes: dict[str, int], batch: int, remat: Any = None) -> configs.ConfigDict:
        config = self.config.copy_and_resolve_references()
        config.train.batch_size = batch
        config.mesh.update(sizes)
        if remat is not None:
            config.model.remat = remat
        return config

    def _program(self, sizes: dict[str, int], batch: int, remat: Any = None):
        mesh = self.mesh(sizes)
        sharding.check_batch(mesh, batch, self.config.train.accumulate, "--batch")
        with targets.tracing_for(self.topology):
            return programs.train(self._with(sizes, batch, remat), self.shape, self.classes, mesh)

    def train(
        self, sizes: dict[str, int], batch: int, remat: Any = None, of: tuple[int, int] | None = None
    ) -> cost.Estimate:
        """One step of training on `batch` samples, of all devices together. of: (3, 12), the third of twelve."""
        what = f"training step, {said(sizes)}, batch {batch:,}" + (f", remat {remat}" if remat is not None else "")
        self.stage(what, of)
        built, traced = self._program(sizes, batch, remat)
        work = flops.of_step(built, traced)
        compiled = programs.compile(traced, self.topology, self.cache)
        return self._estimate("train", compiled, batch, programs.state_bytes(built), work.model)

    def sample(self, sizes: dict[str, int], batch: int) -> cost.Estimate:
        """The recipe's sampling of `batch` samples, rounded up to what divides over the mesh."""
        mesh = self.mesh(sizes)
        parts = sharding.batch_shards(mesh)
        batch = -(-batch // parts) * parts
        steps = self.config.sampling.steps
        self.stage(f"sampler, {self.config.sampling.solver} with {steps} steps, {said(sizes)}, batch {batch:,}")
        with targets.tracing_for(self.topology):
            parameters, traced = programs.sampler(self.config, self.shape, self.classes, mesh, batch)
        compiled = programs.compile(traced, self.topology, self.cache)
        return self._estimate("sample", compiled, batch, {"parameters": parameters}, flops.count(traced.jaxpr))

    def _estimate(self, name, compiled, batch, parts, model_flops) -> cost.Estimate:
        return cost.estimate(
            name, compiled, batch=batch, devices=len(self.devices), chip=self.chip, peak=self.peak, parts=parts,
            model_flops=model_flops,
        )  # fmt: skip

    def largest(self, sizes: dict[str, int], start: int) -> search.Largest:
        """The largest batch of all devices together whose step fits their memory; only where that is known."""

        def needed(batch: int) -> float:
            self.stage(f"training step, {said(sizes)}, batch {batch:,}: does it fit?")
            _, traced = self._program(sizes, batch)
            return programs.compile(traced, self.topology, self.cache).bytes

        unit = sharding.batch_shards(self.mesh(sizes)) * self.config.train.accumulate
        assert self.chip is not None
        return search.largest(needed, self.chip.memory, unit, start)

    def meshes(self) -> list[dict[str, int]]:
        """What a sweep tries. The tensor axis only where the recipe or --mesh sets it: most networks have no rules."""
        return search.meshes(len(self.devices), tensor=self.config.mesh.tensor != 1)

    def remats(self) -> list[Any]:
        """The recomputation policies that the network has; None is that it has no choice."""
        remat = self.config.model.get("remat")
        if isinstance(remat, bool):
            return [False, True]
        return list(REMAT) if isinstance(remat, str) else [None]

    def sweep(self, batch: int):
        """Yields ({"mesh": sizes, "remat": policy}, Estimate) for all meshes that the batch divides over."""
        shards = self.config.train.accumulate
        settings = [
            {"mesh": sizes, "remat": remat}
            for sizes in self.meshes()
            if batch % (sizes["data"] * sizes["fsdp"] * shards) == 0
            for remat in self.remats()
        ]
        for i, setting in enumerate(settings):
            yield setting, self.train(setting["mesh"], batch, setting["remat"], (i + 1, len(settings)))


def said(sizes: dict[str, int]) -> str:
    """{"data": 4, "fsdp": 2, "tensor": 1} -> "data=4 fsdp=2"."""
    return " ".join(f"{k}={v}" for k, v in sizes.items() if v != 1) or "one device"
