"""Run by test_sharding.py in a process with eight CPU devices: measures, and prints one JSON object."""

import contextlib
import dataclasses
import functools
import io
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jax_diffusion import attention, experiment, sharding
from jax_diffusion import config as configs
from jax_diffusion import model as models
from jax_diffusion.cli.main import main
from jax_diffusion.train import checkpoint, program

MESHES = {  # data, fsdp, tensor
    "one": (1, 1, 1), "four": (1, 4, 1), "data": (8, 1, 1), "fsdp": (1, 8, 1), "hybrid": (2, 4, 1),
    "tensor": (1, 4, 2), "all": (2, 2, 2),
}  # fmt: skip
FIELDS = ["optim.learning_rate=1e-3", "optim.schedule=constant", "optim.warmup=0", "optim.eps=1e-3", "ema.decay=0.5",
          "train.batch_size=16", "train.steps=100"]  # fmt: skip
SHAPE = (8, 8, 1)
NETWORKS = {
    "unet": {"channels": 16, "multipliers": (1,), "attention_levels": (), "heads": 2},
    "dit": {"size": "", "width": 32, "depth": 2, "heads": 4, "patch": 2},
}


def make_mesh(name):
    sizes = MESHES[name]
    return sharding.make_mesh(*sizes, devices=jax.devices()[: sizes[0] * sizes[1] * sizes[2]])


def make_config(network, **train):
    config = configs.override(configs.resolve("digits"), [f"--config.{f}" for f in FIELDS])
    config.model = configs.network(network, **NETWORKS[network])
    config.train.update(train)
    return config


class Run:
    """The training step of a network on a mesh."""

    def __init__(self, network, mesh, **train):
        self.config, self.mesh = make_config(network, **train), make_mesh(mesh)
        self.built = program.build(self.config, SHAPE, 10, self.mesh)
        self.abstract, self.shardings = self.built.abstract_state()
        self.step = self.built.trace().lower().compile()

    def train(self, state, steps, first=0):
        for i in range(first, first + steps):
            rng = np.random.default_rng(i)
            batch = {"image": rng.integers(0, 256, (16, *SHAPE), np.uint8), "label": rng.integers(0, 10, 16, np.int32)}
            batch = jax.device_put(batch, sharding.batch_sharding(self.mesh))
            # Waited for: two programs at once would want more threads than eight CPU devices have.
            state, _ = jax.block_until_ready(self.step(state, jax.block_until_ready(batch)))
        return state

    def start(self):
        """The initial state with noise on the weights: at the zero-initialised start most gradients are zero."""
        first = jax.device_get(self.built.init(jax.random.key(0)))
        leaves, tree = jax.tree.flatten(first.params)
        rng = np.random.default_rng(1)
        params = tree.unflatten([p + 0.05 * rng.standard_normal(p.shape).astype(np.float32) for p in leaves])
        first = dataclasses.replace(first, params=params, ema=params)
        return jax.block_until_ready(jax.tree.map(lambda a, s: jax.device_put(jnp.array(a), s), first, self.shardings))


def furthest(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in pairs)


def layout(tree):
    """[name, shape, shape of a shard] of each leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [
        [sharding.path_name(p), x.shape, x.sharding.shard_shape(x.shape)] for p, x in leaves if hasattr(x, "sharding")
    ]


def held(tree, device):
    shards = [s for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == device]
    return sum(s.data.nbytes for s in shards)


def refusal(*arguments):
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        return [main(list(arguments)), err.getvalue()]


def message(call):
    try:
        call()
    except ValueError as e:
        return f"{type(e).__name__}: {e}"
    return ""


def of_meshes(network, names):
    """{name: (Run, its state after two steps)}."""
    runs = {name: Run(network, name) for name in names}
    return {name: (r, r.train(r.start(), 2)) for name, r in runs.items()}


def apart(runs, others=()):
    one = runs["one"][1]
    every = [*((name, s) for name, (_, s) in runs.items()), *others]
    return {name: [furthest(one.params, s.params), furthest(one.ema, s.ema)] for name, s in every}


def splash_apart(name):
    """The interpreted kernel on a mesh beside XLA's attention, output and gradients; and the devices of its output."""
    mesh = make_mesh(name)
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, gradient = (jax.random.normal(key, (8, 128, 2, 16)) for key in keys)

    def both(f):
        y, back = jax.vjp(f, q, k, v)
        return [y, *back(gradient)]

    kernel = functools.partial(attention.splash, mesh=mesh, interpret=True)
    ours, theirs = jax.jit(lambda: both(kernel))(), both(jax.nn.dot_product_attention)
    return furthest(ours, theirs), len(ours[0].sharding.device_set)


def restored(workdir, runs, saved, into):
    """A state saved on one mesh and restored into others: how far apart, whether it lies there as its own would, and
    how far apart training ends that goes on from it."""
    state, out = runs[saved][1], {}
    with checkpoint.Checkpointer(workdir) as checkpoints:
        checkpoints.save(state)
        checkpoints.wait()
        for name in into:
            r = runs[name][0]
            back = checkpoints.restore(r.abstract)
            lies = layout(back.params) == layout(r.abstract.params)
            exact = furthest(state, back)
            out[name] = [exact, lies, jax.device_get(r.train(back, 1, first=2).params)]
    first = out[into[0]][2]
    return {name: [exact, lies, furthest(first, after)] for name, (exact, lies, after) in out.items()}


def run(workdir):
    out = {"devices": jax.device_count()}
    unet = of_meshes("unet", ["one", "data", "fsdp"])
    dit = of_meshes("dit", ["one", "four", "hybrid", "tensor", "all"])
    parts = Run("dit", "all", accumulate=2)
    out["apart"] = {
        "unet": apart(unet), "dit": apart(dit, [("accumulated", parts.train(parts.start(), 2))])
    }  # fmt: skip
    out["moved"] = {
        n: furthest(r["one"][0].start().params, r["one"][1].params) for n, r in (("unet", unet), ("dit", dit))
    }
    full, one = unet["fsdp"][1], unet["one"][1]
    out["layout"] = {"params": layout(full.params), "ema": layout(full.ema), "opt_state": layout(full.opt_state)}
    out["bytes"] = [held(full, jax.devices()[i]) for i in (0, 7)]
    out["all_bytes"] = sum(x.nbytes for x in jax.tree.leaves(full))
    out["replicated_bytes"] = held(unet["data"][1], jax.devices()[3])
    out["tensor_layout"] = {name: [shape, shard] for name, shape, shard in layout(dit["all"][1].params)}
    out["restored"] = {
        "fsdp": restored(f"{workdir}/unet", unet, "fsdp", ["one", "data"]),
        "all": restored(f"{workdir}/dit", dit, "all", ["one", "four", "tensor"]),
    }

    config = make_config("unet")
    parts = experiment.build(config, SHAPE, 10)
    names = tuple(map(str, range(10)))
    model = models.make(config, jax.device_get(one.ema), SHAPE, names, 2, parts)
    samples = [
        model.sample(jax.random.key(0), num=11, labels=[3, 4], guidance=1.5, batch_size=b, mesh=make_mesh(name))
        for name, b in (("one", 11), ("data", 11), ("hybrid", 5))
    ]
    out["samples_apart"] = [furthest(samples[0], s) for s in samples]
    out["samples_spread"] = float(np.abs(samples[0][0] - samples[0][2]).max())

    out["splash"] = {name: splash_apart(name) for name in ("data", "all")}

    out["errors"] = {
        "product": message(lambda: sharding.make_mesh(3, 1, 1)),
        "two rests": message(lambda: sharding.make_mesh(-1, -1, 1)),
        "zero": message(lambda: sharding.make_mesh(8, 0, 1)),
        "batch": message(lambda: sharding.check_batch(make_mesh("hybrid"), 20)),
        "accumulate": message(lambda: sharding.check_batch(make_mesh("data"), 24, 2)),
        "fine": message(lambda: sharding.check_batch(make_mesh("hybrid"), 32, 4)),
    }
    out["rest"] = dict(sharding.make_mesh(-1, 4, 1).shape)
    out["command"] = refusal("train", "--config=digits", f"--workdir={workdir}/x", "--config.train.batch_size=12")
    rules = [("head/kernel$", (None, None, "tensor", None)), ("norm", "replicated"), (".*", "largest")]
    mesh = sharding.make_mesh(1, 4, 2)
    shapes = {"head/kernel": (3, 3, 16, 1), "norm/scale": (16,), "up/0/kernel": (3, 3, 32, 16), "odd": (3, 5)}
    out["specs"] = {n: repr(sharding.spec_of(n, s, mesh, rules)) for n, s in shapes.items()}
    out["tensor_errors"] = {
        "unet": message(lambda: program.build(make_config("unet"), SHAPE, 10, make_mesh("all"))),
        "heads": message(lambda: program.build(make_config("dit"), SHAPE, 10, sharding.make_mesh(1, 1, 8))),
    }
    return out


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1])))
