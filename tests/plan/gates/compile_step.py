"""Compiles one tiny training step for an accelerator that is not there and prints what the gates ask, as JSON.

    python compile_step.py v5e:2x2 dit

A process of its own, started by checks.py in plan.targets.environment: what it imports must never reach the tests' JAX.
"""

import importlib.metadata
import json
import math
import re
import sys
from collections import Counter

import jax

from jax_diffusion import config as configs
from jax_diffusion import sharding
from jax_diffusion.plan import collectives, hlo, programs, targets, work
from jax_diffusion.train import program

BATCH = 64
NETWORKS = {  # name: (shape, classes, model)
    "unet": ((8, 8, 3), 0, {"name": "unet", "channels": 64, "multipliers": (1, 2), "blocks": 1, "heads": 2,
                            "dropout": 0.1, "dtype": "bfloat16"}),
    "dit": ((8, 8, 4), 10, {"name": "dit", "size": "", "width": 256, "depth": 4, "heads": 4, "patch": 1,
                            "dtype": "bfloat16"}),
}  # fmt: skip


def build(target: str, name: str) -> program.Program:
    shape, classes, model = NETWORKS[name]
    config = configs.default()
    config.model = configs.network(**model)
    config.train.update(batch_size=BATCH, steps=1000)
    config.mesh.update(data=1, fsdp=-1)
    mesh = sharding.make_mesh(1, -1, 1, devices=targets.devices(target))
    return program.build(config, shape, classes, mesh)


def facts(made: program.Program, target: str) -> dict:
    """All of one device, except state.bytes and state.parameters."""
    state, _ = made.abstract_state()
    leaves = jax.tree.leaves(state)
    one = [math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves]
    with targets.tracing_for(target):  # with cuDNN's attention, which need not be installed
        traced = made.trace()
    compiled = programs.compile(traced, target)
    text = compiled.hlo
    header = text.split("\n", 1)[0]
    calls = Counter(re.findall(r'custom_call_target="([^"]+)"', text))
    kernels = sum(n for _, i, n in hlo.walk(text, fused=False) if i.opcode in ("fusion", "custom-call", "copy"))
    versions = {}
    for package in ("jax", "libtpu", "jax-cuda13-pjrt"):
        versions[package] = importlib.metadata.version(package)
    return {
        "versions": versions,
        "seconds": round(compiled.seconds, 1),
        "memory": compiled.memory,
        "state": {
            "bytes": sum(x.size * x.dtype.itemsize for x in leaves),
            "shard": sum(one),
            "leaves": len(leaves),
            "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        },
        "batch": sum(x.size * x.dtype.itemsize for x in made.abstract_batch().values()) // made.mesh.size,
        "aliased": len(re.findall(r"(?:may|must)-alias", header)),
        "collectives": {kind: c.bytes for kind, c in collectives.collectives(text).items()},
        "cycles": hlo.cycles(text),
        "traffic": work.traffic(text),
        "kernels": kernels,
        "convolutions": Counter(
            re.findall(r'dim_labels=(\S+?),.*custom_call_target="__cudnn\$conv', text),
        ),
        "calls": calls,
    }


if __name__ == "__main__":
    target, name = sys.argv[1:3]
    print(json.dumps(facts(build(target, name), target)))
