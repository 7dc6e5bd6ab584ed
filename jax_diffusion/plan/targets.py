"""Accelerators that are not at hand: their names, and devices that programs can be compiled for and not run on."""

import contextlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from jax_diffusion import hardware
from jax_diffusion.errors import UserError, choose

# Axes of a TPU slice, and whether a chip's two cores are one device.
TPUS = {"v4": (3, True), "v5e": (2, False), "v5p": (3, True), "v6e": (2, False)}
GPUS = ("a100", "h100", "h200", "b200")
EXAMPLES = "v5e:4x4, v4:2x2x1, v5p:2x2x1, v6e:2x2, h100:8, a100:1, cpu:8"


class Topology(NamedTuple):
    """See `parse`."""

    name: str  # "v5e:4x4"
    family: str  # tpu, cuda, cpu
    kind: str  # "v5e"
    sizes: tuple[int, ...]  # (4, 4)

    @property
    def count(self) -> int:  # type: ignore[override]  # hides tuple.count, which nobody wants of it
        """Devices, one a chip."""
        count = 1
        for n in self.sizes:
            count *= n
        return count

    @property
    def chip(self) -> hardware.Chip | None:
        """None for CPUs, of which nothing is known."""
        return hardware.CHIPS.get(self.kind)


def parse(name: str) -> Topology:
    """ "v5e:4x4" -> Topology. Raises UserError for what there is not."""
    kind, _, said = name.partition(":")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", said):
        raise UserError(f"--topology={name}: give the kind of chip and how many, for instance {EXAMPLES}")
    choose("--topology", kind, (*TPUS, *GPUS, "cpu"))
    sizes = tuple(map(int, said.split("x")))
    axes = TPUS[kind][0] if kind in TPUS else 1
    if len(sizes) != axes:
        like = {1: "8", 2: "4x4", 3: "2x2x1"}[axes]
        raise UserError(f"--topology={name}: {kind} is given by {axes} number{'s' * (axes > 1)}, like {kind}:{like}")
    family = "tpu" if kind in TPUS else "cuda" if kind in GPUS else "cpu"
    return Topology(name, family, kind, sizes)


def environment(name: str, base: Mapping[str, str]) -> dict[str, str]:
    """The environment `base` for a process that compiles for the topology `name`."""
    topology = parse(name)
    # JAX's own folder of compiled programs holds none of absent devices.
    new = {**base, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "0"}
    if topology.family == "tpu":
        new |= {
            # No machine is asked what it is: the slice is described by its name alone.
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_ACCELERATOR_TYPE": "v5litepod-4",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # another compilation may be under way
            "TPU_LOG_DIR": "disabled",
        }
    if topology.family == "cpu":
        count = f"--xla_force_host_platform_device_count={topology.count}"
        new["XLA_FLAGS"] = f"{base.get('XLA_FLAGS', '')} {count}".strip()
    return new


def devices(name: str) -> list:
    """The devices of a topology, as jax.Device. The process must have been started in `environment(name)`.

    Raises UserError where the compiler is missing or knows no such slice.
    """
    topology = parse(name)
    if topology.family == "cuda":
        from jax_diffusion.plan import cuda

        return list(cuda.devices(topology.kind, topology.count))
    if topology.family == "cpu":
        import jax

        return jax.devices("cpu")[: topology.count]
    return _tpu_devices(topology)


@contextlib.contextmanager
def tracing_for(name: str):
    """What is traced within is what JAX would trace where the devices of the topology `name` are."""
    from jax_diffusion import lowering, onednn

    topology = parse(name)
    with contextlib.ExitStack() as stack:
        stack.enter_context(onednn.off())  # XLA's text does not say what a call of it computes
        if topology.family == "cuda":
            from jax_diffusion.plan import cuda

            stack.enter_context(cuda.tracing_for(topology.kind))
        stack.enter_context(lowering.compiling_for(topology.family))
        yield


def _tpu_devices(topology: Topology) -> list:
    from jax.experimental import topologies

    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise UserError(
            f"--topology={topology.name}: TPU's compiler is not installed: pip install 'jax[tpu]' (no TPU is needed)"
        ) from None
    options: dict[str, Any] = {"chip_config_name": "megacore"} if TPUS[topology.kind][1] else {}
    if topology.count == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options).devices)
    except Exception as e:  # jaxlib's own error types differ between versions
        raise UserError(f"--topology={topology.name}: libtpu knows no such slice: {str(e).splitlines()[0]}") from e
