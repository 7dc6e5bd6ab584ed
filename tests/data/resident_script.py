"""Run by test_resident.py in a process with eight CPU devices: batches gathered on the devices beside the host's;
prints one JSON object."""

import json
import re
import sys

import jax
import numpy as np

from jax_diffusion import config as configs
from jax_diffusion import sharding
from jax_diffusion.data import ArraySource, Batches, resident
from jax_diffusion.train import loop

MESHES = {"one": (1, 1, 1), "data": (8, 1, 1), "hybrid": (2, 4, 1), "tensor": (2, 2, 2)}
COLLECTIVE = re.compile(r"all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute")


def sources():
    """37 examples: over no number of devices do they divide. Floats with signed zeros, which a sum would lose."""
    rng = np.random.default_rng(0)
    points = np.where(rng.random((37, 3)) < 0.3, -0.0, rng.standard_normal((37, 3)))
    yield ArraySource(rng.integers(0, 256, (37, 5, 4, 3), np.uint8), rng.integers(0, 7, 37), name="images")
    yield ArraySource(points.astype(np.float32), rows=np.arange(1, 36), name="points")


def batches(source, place, k, on_device):
    held = resident.load(source, on_device, place, lambda line: None)
    options = {"steps_per_dispatch": k, "sharding": place, "stop_step": 8, "resident": held}
    with Batches(source, 16, 3, 1, **options) as made:
        return list(made), held


def same(a, b):
    """Steps, keys, types, bits and placement."""
    equal = [s for s, _ in a] == [s for s, _ in b]
    for (_, x), (_, y) in zip(a, b, strict=True):
        equal &= x.keys() == y.keys()
        for key in x:
            equal &= x[key].sharding.is_equivalent_to(y[key].sharding, x[key].ndim) and x[key].dtype == y[key].dtype
            equal &= np.asarray(x[key]).tobytes() == np.asarray(y[key]).tobytes()
    return bool(equal)


def collectives(held, k):
    indices = held.place(np.zeros((k, 16) if k > 1 else 16, np.int32))
    text = held._gather.lower(held.table, indices).compile().as_text()
    return sorted(set(COLLECTIVE.findall(text)))


def run(workdir):
    out = {"devices": jax.device_count(), "same": {}, "collectives": {}, "share": {}}
    for name, sizes in MESHES.items():
        mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
        for k in (1, 3):
            place = sharding.batch_sharding(mesh, leading=int(k > 1))
            for source in sources():
                want, nothing = batches(source, place, k, "auto")  # a CPU: the host's
                assert nothing is None
                for mode in ("replicate", "shard"):
                    got, held = batches(source, place, k, mode)
                    case = f"{name} {k} {source.name} {mode}"
                    out["same"][case] = same(want, got)
                    out["collectives"][case] = collectives(held, k)
                    shard = held.table["image"].addressable_shards[0].data
                    out["share"][case] = [len(shard), held.table["image"].shape[0]]
    out["spread"] = len({x["image"].tobytes() for _, x in jax.device_get(want)})
    # A whole run, on all eight devices.
    config = configs.override(configs.resolve("digits"), [f"--config.{f}" for f in sys.argv[2:]])
    states, lines = [], []
    for mode in ("never", "replicate", "shard"):
        config.data.on_device = mode
        states.append(loop.train(config, f"{workdir}/{mode}", log=lines.append).state)
    leaves = [jax.tree.leaves(jax.device_get(s)) for s in states]
    out["run"] = [all(np.array_equal(a, b) for a, b in zip(leaves[0], x, strict=True)) for x in leaves]
    out["lines"] = [line for line in lines if "on the devices" in line]
    # A resumed run may change how its batches are made.
    config.data.on_device = "never"
    out["resumed"] = loop.train(config, f"{workdir}/shard", log=lines.append).finished
    return out


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1])))
