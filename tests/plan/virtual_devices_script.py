"""Run by test_plan_virtual.py with eight CPU devices: compiles programs whose collectives and FLOPs are known, prints
what the plan reads in them as JSON."""

import json

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_diffusion import config as configs
from jax_diffusion import sharding
from jax_diffusion.plan import collectives, hlo, programs, work
from jax_diffusion.train import flops

B, D, LAYERS = 64, 128, 5


def read(lowered) -> dict:
    text = lowered.compile().as_text()
    return {
        "collectives": collectives.collectives(text),
        "flops": work.flops(text),
        "trips": sorted(set(hlo.executions(text).values())),
    }


def linear(fsdp: int) -> dict:
    """The gradient of a linear layer and one step down it, data parallel (fsdp=1) or its weight in shards."""
    mesh = sharding.make_mesh(8 // fsdp, fsdp)
    w = jax.ShapeDtypeStruct((D, D), jnp.float32, sharding=NamedSharding(mesh, P("fsdp") if fsdp > 1 else P()))
    x = jax.ShapeDtypeStruct((B, D), jnp.float32, sharding=sharding.batch_sharding(mesh))

    def step(w, x):
        return w - jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w) ** 2))(w)

    return read(jax.jit(step, out_shardings=w.sharding).lower(w, x))


def looped() -> dict:
    """A scan over layers each in eight shards, gathered in the loop."""
    mesh = sharding.make_mesh(1, 8)
    w = jax.ShapeDtypeStruct((LAYERS, D, D), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp")))
    x = jax.ShapeDtypeStruct((B, D), jnp.float32, sharding=sharding.batch_sharding(mesh))

    def layer(x, w):
        return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), x_sharding), None

    x_sharding = x.sharding
    return read(jax.jit(lambda w, x: jax.lax.scan(layer, x, w)[0], out_shardings=x.sharding).lower(w, x))


def training(devices: int, config) -> dict:
    """One training step on the first `devices`, data parallel."""
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    built, traced = programs.train(config, (8, 8, 1), 10, mesh)
    compiled = programs.compile(traced, f"cpu:{devices}")
    found = collectives.collectives(compiled.hlo)
    return {
        "flops": work.flops(compiled.hlo),
        "counted": flops.count(traced.jaxpr),
        "collectives": found,
        "parts": programs.state_bytes(built),
        "argument": compiled.memory["argument"],
    }


def main() -> None:
    config = configs.resolve("digits")
    config.model = configs.network("dit", size="", width=32, depth=2, heads=2, patch=2)
    config.train.batch_size = 16
    out = {
        "data": linear(1),
        "fsdp": linear(8),
        "looped": looped(),
        "training": {n: training(n, config) for n in (1, 2, 8)},
    }
    print(json.dumps(out))


if __name__ == "__main__":
    main()
