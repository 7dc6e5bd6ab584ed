"""The floating-point operations of a traced function: its matrix products and convolutions, two for each multiply-add.

XLA's own cost analysis counts the body of a loop once: of a scan over 28 blocks it sees one.
"""

import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr

from jax_diffusion import config as configs
from jax_diffusion import hardware
from jax_diffusion.onednn import operations

# Options of networks that change how a step is computed and not what: the values that compute nothing twice and leave
# every product to see.
PLAIN = {"remat": {"dots": "none", "full": "none", True: False}}


class Work(NamedTuple):
    """FLOPs of one training step, on all devices together.

    The model's are those that the mathematics asks for, of which an MFU speaks (Chowdhery et al. 2022, appendix B); the
    hardware's include what `remat` computes again in the backward pass.
    """

    model: float
    hardware: float


def of_step(program, traced, batch: Any = None, steps: int = 1) -> Work:
    """The work of one step of `traced = program.trace(batch, steps)`, of a train.program.Program."""
    hardware_flops = count(traced.jaxpr) / steps
    plain = _plain(program.config)
    if plain is None:
        return Work(hardware_flops, hardware_flops)
    from jax_diffusion.train import program as programs

    again = programs.build(plain, program.shape, program.num_classes, program.mesh)
    return Work(count(again.trace(batch).jaxpr), hardware_flops)


def _plain(config: configs.ConfigDict) -> configs.ConfigDict | None:
    """The config that computes nothing twice; None where `config` does not."""
    changed = {k: v[config.model[k]] for k, v in PLAIN.items() if config.model.get(k) in v}
    if not changed:
        return None
    config = config.copy_and_resolve_references()
    config.model.update(changed)
    return config


def peak(device_kind: str, dtype: str, precision: str | None = None) -> float | None:
    """FLOP/s of one chip's matrix units on operands of `dtype`, by its data sheet; None where that is not known.

    precision: jax_default_matmul_precision. By default TPUs multiply float32 as bfloat16, and NVIDIA's GPUs as TF32, at
    half the rate.
    """
    chip = hardware.chip_of(device_kind)
    if chip is None or (dtype == "float32" and precision not in (None, "default")):
        return None
    return chip.bfloat16 / 2 if dtype == "float32" and device_kind.startswith("NVIDIA") else chip.bfloat16


def measured_peak(dtype: str, size: int = 0) -> float:
    """FLOP/s of one device on square matrices of `dtype`, the best of five tries: what no step can beat."""
    size = size or (1024 if jax.default_backend() == "cpu" else 8192)
    x = jnp.ones((size, size), dtype) / size
    product = jax.jit(lambda x: jax.lax.fori_loop(0, 8, lambda _, y: y @ x, x)).lower(x).compile()
    product(x).block_until_ready()
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        product(x).block_until_ready()
        seconds.append(time.perf_counter() - started)
    return 8 * 2 * size**3 / min(seconds)


def count(jaxpr: Jaxpr | ClosedJaxpr) -> float:
    """FLOPs of matmuls and convolutions, on all devices together.

    What is computed again in the backward pass counts again; the body of a `while` counts once.
    """
    if isinstance(jaxpr, ClosedJaxpr):
        jaxpr = jaxpr.jaxpr
    return float(sum(of_equation(eqn) for eqn in jaxpr.eqns))


def of_equation(eqn: Any) -> float:
    """FLOPs of one equation of a jaxpr, with those of the jaxprs within it."""
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        lhs = eqn.invars[0].aval.shape
        return 2 * eqn.outvars[0].aval.size * math.prod(lhs[i] for i in contracted)
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval
        features = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        # Of an input spread out with zeros (the gradient of a strided convolution) most products are nothing.
        return 2 * eqn.outvars[0].aval.size * kernel.size / features / math.prod(params["lhs_dilation"])
    if name in operations.FLOPS:
        return operations.FLOPS[name](*(v.aval for v in (*eqn.invars, *eqn.outvars)), **params)
    inner = [count(j) for j in bodies(params)]
    if name == "cond":
        return max(inner, default=0.0)
    return params.get("length", 1) * sum(inner) if name == "scan" else sum(inner)


def bodies(params: dict[str, Any]) -> Iterator[Jaxpr | ClosedJaxpr]:
    """The jaxprs within an equation: of loops, branches, calls."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, Jaxpr | ClosedJaxpr):
                yield item
