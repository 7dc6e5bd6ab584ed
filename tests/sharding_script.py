"""Run by test_sharding.py in a process with eight CPU devices: measures, and prints one JSON object."""

import contextlib
import io
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jax_diffusion import config as configs
from jax_diffusion import experiment, sharding
from jax_diffusion import model as models
from jax_diffusion.cli.main import main
from jax_diffusion.train import checkpoint, optim, state, step

MESHES = {"one": (1, 1, 1), "data": (8, 1, 1), "fsdp": (1, 8, 1), "hybrid": (2, 4, 1)}
FIELDS = ["model.channels=16", "model.multipliers=(1,)", "model.attention_levels=()", "model.heads=2",
          "optim.learning_rate=1e-3", "optim.schedule=constant", "optim.warmup=0", "optim.eps=1e-3"]  # fmt: skip


def make_mesh(name):
    data, fsdp, tensor = MESHES[name]
    return sharding.make_mesh(data, fsdp, tensor, devices=jax.devices()[: data * fsdp * tensor])


def train(config, name, start):
    """Two steps from `start`. Returns the state, its mesh and its abstract state in shards."""
    mesh = make_mesh(name)
    parts = experiment.build(config, (8, 8, 1), 10, sharding.activation_constraint(mesh))
    optimizer, _ = optim.make(config.optim, 100)
    init = state.make_init(parts.network, optimizer, parts.times, parts.process)
    abstract = jax.eval_shape(init, jax.random.key(0))
    shardings = sharding.tree_shardings(mesh, abstract)
    one = step.make_train_step(parts.network, parts.process, parts.times, optimizer, seed=0, ema_decay=0.5)
    now = start(init, shardings)
    run, rng = step.compile_step(one, shardings, mesh), np.random.default_rng(0)
    for _ in range(2):
        image, label = rng.integers(0, 256, (16, 8, 8, 1), np.uint8), rng.integers(0, 10, 16, np.int32)
        batch = jax.device_put({"image": image, "label": label}, sharding.batch_sharding(mesh))
        now, _ = run(now, batch)
    place = lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)  # noqa: E731
    return now, jax.tree.map(place, abstract, shardings)


def perturbed(init, shardings):
    """The initial state with noise on the weights: at the zero-initialised start most gradients are zero."""
    first = jax.device_get(jax.jit(init)(jax.random.key(0)))
    leaves, tree = jax.tree.flatten(first.params)
    rng = np.random.default_rng(1)
    params = tree.unflatten([p + 0.05 * rng.standard_normal(p.shape).astype(np.float32) for p in leaves])
    first = state.TrainState(first.step, params, first.opt_state, params, first.timesteps)
    return jax.tree.map(lambda a, s: jax.device_put(jnp.array(a), s), first, shardings)


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


def run(workdir):
    config = configs.override(configs.resolve("digits"), [f"--config.{f}" for f in FIELDS])
    out = {"devices": jax.device_count()}
    states = {name: train(config, name, perturbed) for name in MESHES}
    one = states["one"][0]
    out["apart"] = {n: furthest(one.params, s.params) for n, (s, _) in states.items()}
    out["ema_apart"] = {n: furthest(one.ema, s.ema) for n, (s, _) in states.items()}
    start = perturbed(*_init_of(config))
    out["moved"] = furthest(start.params, one.params)

    full = states["fsdp"][0]
    out["layout"] = {"params": layout(full.params), "ema": layout(full.ema), "opt_state": layout(full.opt_state)}
    out["bytes"] = [held(full, jax.devices()[i]) for i in (0, 7)]
    out["all_bytes"] = sum(x.nbytes for x in jax.tree.leaves(full))
    out["replicated_bytes"] = held(states["data"][0], jax.devices()[3])

    with checkpoint.Checkpointer(workdir) as checkpoints:
        checkpoints.save(full)
        checkpoints.wait()
        restored = {n: checkpoints.restore(states[n][1]) for n in ("data", "hybrid", "one")}
    out["restored_apart"] = {n: furthest(full, r) for n, r in restored.items()}
    out["restored_layout"] = layout(restored["hybrid"].params) == layout(states["hybrid"][0].params)

    parts = experiment.build(config, (8, 8, 1), 10)
    names = tuple(map(str, range(10)))
    model = models.make(config, jax.device_get(one.ema), (8, 8, 1), names, 2, parts)
    samples = [
        model.sample(jax.random.key(0), num=11, labels=[3, 4], guidance=1.5, batch_size=b, mesh=make_mesh(name))
        for name, b in (("one", 11), ("data", 11), ("hybrid", 5))
    ]
    out["samples_apart"] = [furthest(samples[0], s) for s in samples]
    out["samples_spread"] = float(np.abs(samples[0][0] - samples[0][2]).max())

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
    return out


def _init_of(config):
    parts = experiment.build(config, (8, 8, 1), 10)
    optimizer, _ = optim.make(config.optim, 100)
    init = state.make_init(parts.network, optimizer, parts.times, parts.process)
    mesh = make_mesh("one")
    return init, sharding.tree_shardings(mesh, jax.eval_shape(init, jax.random.key(0)))


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1])))
