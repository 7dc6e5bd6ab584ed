"""Run by test_scaling.py in a process with eight CPU devices: compiles the training step for 1 to 8 of them and prints
what each one does as one JSON object."""

import json

import jax

from jax_diffusion import config as configs
from jax_diffusion import sharding
from jax_diffusion.plan import programs
from jax_diffusion.plan.collectives import collectives
from jax_diffusion.plan.work import flops
from jax_diffusion.train import program

SHAPE, BATCH = (8, 8, 1), 64
NETWORKS = {
    "dit": {"size": "", "width": 64, "depth": 3, "heads": 2, "patch": 2},
    "unet": {"channels": 16, "multipliers": (1,), "attention_levels": (), "blocks": 1},
}
MESHES = {  # data, fsdp, and tensor where it is not 1
    "dit": [(1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (1, 8), (2, 4), (1, 1, 2), (2, 2, 2)],
    "unet": [(8, 1)],
}


def measure(config, data, fsdp, tensor=1):
    mesh = sharding.make_mesh(data, fsdp, tensor, devices=jax.devices()[: data * fsdp * tensor])
    built = program.build(config, SHAPE, 10, mesh)
    text = built.trace().lower().compile().as_text()
    abstract, _ = built.abstract_state()
    cut = whole = 0
    for leaf in jax.tree.leaves(abstract.params):
        if leaf.sharding.shard_shape(leaf.shape) == leaf.shape:
            whole += leaf.size
        else:
            cut += leaf.size
    return {
        "flops": flops(text),
        "collectives": {kind: list(c) for kind, c in collectives(text).items()},
        "parameters": {"cut": cut, "whole": whole},
    }


if __name__ == "__main__":
    out = {}
    for name, meshes in MESHES.items():
        config = configs.resolve("digits")
        config.model = configs.network(name, **NETWORKS[name])
        config.train.batch_size = BATCH
        out[name] = {"x".join(map(str, sizes)): measure(config, *sizes) for sizes in meshes}
    config.sampling.update(guidance=2.0, steps=4)
    _, sampler = programs.sampler(config, SHAPE, 10, sharding.make_mesh(), 16)
    out["guided sampler"] = collectives(sampler.lower().compile().as_text())
    print(json.dumps(out))
