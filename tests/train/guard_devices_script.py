"""Run by test_guard_devices.py in a process with four CPU devices: steps with bad batches on meshes, as JSON."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np

from jax_diffusion import config as configs
from jax_diffusion import experiment, sharding
from jax_diffusion.data import ArraySource
from jax_diffusion.train import program

MESHES = {"one": (1, 1), "fsdp": (1, 4), "hybrid": (2, 2)}
BATCH, STEPS, BAD = 16, 5, (1, 2)


def batch_of(i, bad):
    """One NaN, in the part of one device alone."""
    rng = np.random.default_rng(i)
    image = rng.normal(size=(BATCH, 2)).astype(np.float32)
    if bad:
        image[13, 0] = np.nan
    return {"image": image, "label": rng.integers(0, 2, BATCH).astype(np.int32)}


def bits(state):
    parts = state.params, state.opt_state, state.ema
    return [np.asarray(jax.device_get(x)).tobytes() for x in jax.tree.leaves(parts)]


def furthest(a, b):
    return max(float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in zip(a, b, strict=True))


def measure(name):
    data, fsdp = MESHES[name]
    mesh = sharding.make_mesh(data, fsdp, 1, devices=jax.devices()[: data * fsdp])
    config = configs.override(configs.resolve("toy2d"), [f"--config.{f}" for f in (
        "model.width=32", "model.depth=1", f"train.batch_size={BATCH}", "train.steps_per_dispatch=1",
        "train.accumulate=2", "optim.warmup=0", "optim.schedule=constant", "optim.eps=1e-3")])  # fmt: skip
    built = program.build(config, (2,), 2, mesh)
    place = sharding.batch_sharding(mesh)
    first = batch_of(0, False)
    shapes = experiment.abstract_batch(ArraySource(first["image"], first["label"]), BATCH)
    run = built.trace(shapes).lower().compile()
    now, _ = built.create(jax.random.key(0))
    other = jax.tree.map(jnp.copy, now)
    in_a_row, losses = [], []
    for i in range(STEPS):
        now, said = run(now, jax.device_put(batch_of(i, i in BAD), place))
        in_a_row.append(int(said["in_a_row"]))
        losses.append(float(said["loss"]))
        if i in BAD:
            one = jax.device_put(np.int32(i + 1), other.step.sharding)
            other = dataclasses.replace(other, step=one)
        else:
            other, _ = run(other, jax.device_put(batch_of(i, False), place))
    vitals = {k: float(v) for k, v in built.vitals()(now).items()}
    return now, {
        "the same bits": bits(now) == bits(other),
        "in_a_row": in_a_row,
        "finite": [bool(np.isfinite(v)) for v in losses],
        "vitals": vitals,
        "cut": any(x.sharding.shard_shape(x.shape) != x.shape for x in jax.tree.leaves(now.params)),
    }


if __name__ == "__main__":
    out, params = {}, {}
    for name in MESHES:
        now, out[name] = measure(name)
        params[name] = jax.device_get(jax.tree.leaves((now.params, now.ema)))
    for name in MESHES:
        out[name]["apart"] = furthest(params["one"], params[name])
    print(json.dumps(out))
