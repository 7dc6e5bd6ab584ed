"""NVIDIA GPUs to compile for that are not at hand. XLA is told what one is and compiles as on it, autotuning apart.

XLA's plugin is enough, `pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt`: no GPU, driver or CUDA libraries.

Memory is that of `memory_analysis()`. Convolutions and attention are calls of cuDNN, whose workspaces and times are
unknown before it runs; nothing is timed, `cost_analysis()` is empty.
"""

import contextlib
import importlib.util
import os
from typing import NamedTuple

from jax_diffusion import hardware
from jax_diffusion.errors import UserError, choose


class Architecture(NamedTuple):
    """What XLA's heuristics ask of a GPU beside the rates and the memory of hardware.py.

    Sources: NVIDIA's A100, H100 and Blackwell architecture papers; registers, threads and shared memory by compute
    capability from the CUDA C++ programming guide, table of technical specifications.
    """

    device: str  # as the driver calls it
    capability: tuple[int, int]
    processors: int  # streaming multiprocessors that are switched on
    lanes: int  # float32 units of each
    clock: float  # GHz, boost
    l2_cache: int  # bytes
    shared_memory: int  # bytes of each processor
    shared_memory_block: int  # bytes of one block of threads, at most


MiB, KiB = 2**20, 2**10
CUDNN = (9, 10)  # the version that is compiled for

ARCHITECTURES = {
    "a100": Architecture("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 1.41, 40 * MiB, 164 * KiB, 163 * KiB),
    "h100": Architecture("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 1.98, 50 * MiB, 228 * KiB, 227 * KiB),
    "h200": Architecture("NVIDIA H200", (9, 0), 132, 128, 1.98, 50 * MiB, 228 * KiB, 227 * KiB),
    "b200": Architecture("NVIDIA B200", (10, 0), 148, 128, 1.965, 126 * MiB, 228 * KiB, 227 * KiB),
}


def target(name: str) -> str:
    """XLA's description of the GPU `name`, a text proto GpuTargetConfigProto."""
    gpu, chip = ARCHITECTURES[name], hardware.CHIPS[name]
    major, minor = gpu.capability
    return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  core_count: {gpu.processors}
  fpus_per_core: {gpu.lanes}
  clock_rate_ghz: {gpu.clock}
  memory_bandwidth: {int(chip.bandwidth)}
  device_memory_size: {int(chip.memory)}
  l2_cache_size: {gpu.l2_cache}
  shared_memory_per_core: {gpu.shared_memory}
  shared_memory_per_block: {48 * KiB}
  shared_memory_per_block_optin: {gpu.shared_memory_block}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_core_limit: 2048
  threads_per_block_limit: 1024
  threads_per_warp: 32
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
platform_name: "CUDA"
dnn_version_info {{ major: {CUDNN[0]} minor: {CUDNN[1]} }}
runtime_version {{ major: 13 }}
device_description_str: "{gpu.device}"
"""


@contextlib.contextmanager
def tracing_for(name: str):
    """Within it JAX traces cuDNN's attention where the GPU `name` would have it: JAX asks a GPU that is there for the
    width of the heads that it takes, and for an installed cuDNN. One GPU a process: JAX remembers what it traced."""
    from jax._src.cudnn import fused_attention_stablehlo as attention

    capability = ARCHITECTURES[name].capability
    answers = {
        "check_cudnn_version": lambda: 10_000 * CUDNN[0] + 100 * CUDNN[1],
        "check_compute_capability": lambda asked: capability >= tuple(map(int, asked.split("."))),
    }
    before = {question: getattr(attention, question) for question in answers}
    vars(attention).update(answers)
    try:
        yield
    finally:
        vars(attention).update(before)


def devices(name: str, count: int) -> list:
    """`count` GPUs as jax.Device, eight a machine where that divides. Set JAX_PLATFORMS=cpu before jax starts.

    Raises UserError where the plugin is missing, or jax would look for a GPU to run on.
    """
    choose("--topology", name, ARCHITECTURES)
    option = f"--topology={name}:{count}"
    if not any(importlib.util.find_spec(f"jax_cuda{major}_plugin") for major in (13, 12)):
        raise UserError(f"{option}: NVIDIA's compiler is not installed: pip install 'jax[cuda13]' (no GPU is needed)")
    if os.environ.get("JAX_PLATFORMS") != "cpu":
        raise UserError(f"{option}: set JAX_PLATFORMS=cpu, otherwise jax starts the plugin to run on it")
    from jax.experimental import topologies

    local = 8 if count % 8 == 0 else count
    try:
        made = topologies.get_topology_desc(  # partitions x machines x GPUs of each
            platform="cuda", target_config=target(name), topology=f"1x{count // local}x{local}"
        )
    except Exception as e:  # jaxlib's own error types differ between versions
        raise UserError(f"{option}: the plugin cannot compile for it: {str(e).splitlines()[0]}") from e
    return list(made.devices)
