"""JAX's side: the trainer's step, the network, and the sampler's program, each compiled as it is when used.

Variants: `default`; where that is by oneDNN also `xla`, without it; on accelerators `k10`, ten training steps in one
dispatch, and for transformers what the default is not: `scanned`, training with one loop over the blocks, or
`unrolled`, the other modes without one.
"""

import collections
import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_diffusion import lowering, onednn, placement, runtime, sharding
from jax_diffusion import model as models
from jax_diffusion.bench import cases, worker
from jax_diffusion.data import augment
from jax_diffusion.errors import UserError
from jax_diffusion.solvers import noise
from jax_diffusion.train import flops, program, report
from jax_diffusion.train import state as train_state

K = {"k10": 10}  # training steps in one dispatch
UNROLL = {"scanned": 1, "unrolled": 64}  # model.unroll; no transformer has more blocks
SEED = 0


class Prepared(NamedTuple):
    """Something that is ready to be timed."""

    run: Callable[[int], Any]  # does so many steps and waits for the last
    per_call: int  # steps in one dispatch
    memory: int  # bytes that the compiled program holds while it runs, 0 where unknown


class Side:
    """What the parent calls, see worker.py."""

    def __init__(self, threads: int, folder: pathlib.Path):
        self.threads, self.folder = threads, folder
        self.prepared: dict[str, Prepared] = {}
        self.work: cases.Work | None = None
        self.plain = False  # nothing is by oneDNN

    def start(self, compile_cache: str = "off", onednn: bool = True) -> dict[str, Any]:
        """compile_cache: a folder; "off": none, so that the time to compile is told (the environment may name one).
        onednn: False has no variant by it."""
        import flax
        import jaxlib
        import optax

        if compile_cache != "off":
            runtime.keep_compiled(compile_cache)
        lowering.keep_memory()
        self.plain = not onednn
        device = jax.devices()[0]
        return {
            "platform": jax.default_backend(),
            "device": device.device_kind,
            "devices": len(jax.devices()),
            "memory": (device.memory_stats() or {}).get("bytes_limit", 0),
            "versions": {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "flax": flax.__version__,
                         "optax": optax.__version__},
            "compile_cache": jax.config.jax_compilation_cache_dir or "",
        }  # fmt: skip

    def ceiling(self, size: int, dtype: str, seconds: float) -> float:
        """FLOP/s of one large square matrix product."""
        a = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype))
        product = jax.jit(lambda a, b: a @ b)
        run = lambda: jax.block_until_ready([product(a, a) for _ in range(4)])  # noqa: E731
        run()
        return 4 * 2 * size**3 / min(worker.clock(run, seconds / 5) for _ in range(5))

    def load(self, **work: Any) -> dict[str, Any]:
        """Builds the network and its weights; the sizes that the parent should know."""
        before, self.work = self.work, cases.Work(**work)
        if before is None or not before.same_network(self.work):
            self.config = cases.make_config(self.work)
            init = self._program(self.work.batch).parts.network.init
            # Kept on the host, so that the device holds what training holds.
            self.params = weights(
                jax.eval_shape(init, jax.random.key(SEED)), head=3e-4 if self.work.mode == "sample" else 1.0
            )
        count = sum(p.size for p in jax.tree.leaves(self.params))
        return {"parameters": int(count), "null_label": bool(self.config.model.get("null_label", False))}

    def export(self) -> None:
        """Leaves the network and what is needed to train and sample it for PyTorch's worker."""
        from jax_diffusion.bench import export

        built = self._program(self.work.batch)
        export.write(self.folder, self.work, self.config, built, self.params)

    def variants(self, mode: str) -> list[str]:
        if jax.default_backend() == "cpu":
            return ["default", "xla"] if onednn.taken() and not self.plain else ["default"]
        training = mode == "train"
        loops = ["scanned" if training else "unrolled"] if "unroll" in self.config.model else []
        return ["default", *(["k10"] if training else []), *loops]

    def _program(self, batch: int, variant: str = "default") -> program.Program:
        config = self.config.copy_and_resolve_references()
        config.train.batch_size = batch
        if variant in UNROLL:
            config.model.unroll = UNROLL[variant]
        mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
        return program.build(config, self.work.about.shape, self.work.about.classes, mesh)

    def check(self, batch: int, variant: str = "default") -> str:
        """The network's output and the loss on cases.inputs, as a file."""
        built, given = self._program(batch), cases.inputs(self.work, batch)
        p, net = built.parts.process, built.parts.network

        def outputs(params, x0, t, label, eps):
            alpha, sigma = (jnp.reshape(a, (-1, 1, 1, 1)) for a in p.schedule.alpha_sigma(t))
            x0 = augment.to_float(x0)
            x_t = alpha * x0 + sigma * eps
            cond = {"label": label} if net.num_classes else {}
            prediction = net.apply(params, *p.network_inputs(x_t, t), cond)
            return prediction, p.loss(prediction, p.parameterization.target(x0, eps, t), x_t, t)

        arguments = [jnp.asarray(given[k]) for k in ("x0", "t", "label", "noise")]
        with onednn.off(self.plain or variant == "xla"), placement.tracing_for(built.mesh):
            prediction, loss = jax.device_get(lowering.jit(outputs)(self.params, *arguments))
        return self._save("check", output=prediction, loss=loss)

    def prepare(self, key: str, mode: str, variant: str, batch: int, warmup: int) -> dict[str, Any]:
        """Compiles and warms up `mode`. Returns seconds to compile, seconds a step, and FLOPs a step."""
        make = {"train": self._train, "forward": self._forward, "sample": self._sample}[mode]
        started = time.perf_counter()
        with onednn.off(self.plain or variant == "xla"):
            ready, work = make(batch, variant)
            ready.run(ready.per_call)
        first = time.perf_counter() - started
        ready.run(max(warmup // ready.per_call, 1) * ready.per_call)
        again = time.perf_counter()
        ready.run(ready.per_call)
        again = time.perf_counter() - again
        self.prepared[key] = ready
        return {
            "compile_s": max(first - again, 0.0),
            "step_s": again / ready.per_call,
            "flops": work,
            "per_call": ready.per_call,
            "program_memory": ready.memory,
        }

    def _train(self, batch: int, variant: str):
        steps = K.get(variant, 1)
        built = self._program(batch, variant)
        shapes = built.abstract_batch()
        if not self.work.in_pixels:
            shapes["image"] = jax.ShapeDtypeStruct(shapes["image"].shape, jnp.float32)
        traced = built.trace(shapes, steps=steps)
        compiled = traced.lower().compile()
        holder = [self._state(built)]
        given = cases.inputs(self.work, batch)
        data = {"image": given["x0"], "label": given["label"]}
        data = {k: np.stack([v] * steps) if steps > 1 else v for k, v in data.items() if k in shapes}
        data = jax.device_put(data, sharding.batch_sharding(built.mesh, leading=int(steps > 1)))

        def run(n: int) -> None:
            state, flying = holder.pop(), collections.deque[Any]()
            for _ in range(n // steps):
                state, metrics = compiled(state, data)
                flying.append(metrics)
                if len(flying) > report.Meter.IN_FLIGHT:  # as far ahead as the trainer
                    jax.block_until_ready(flying.popleft())
            holder.append(state)
            if not np.isfinite(jax.device_get(metrics["loss"])).all():
                raise FloatingPointError("the loss is not finite")

        return Prepared(run, steps, _bytes(compiled)), flops.count(traced.jaxpr) / steps

    def _state(self, built: program.Program) -> train_state.TrainState:
        """The first state of a run with these weights."""
        shardings = built.abstract_state()[1]

        @functools.partial(jax.jit, out_shardings=shardings)
        def begin(params):
            network, p = built.parts.network._replace(init=lambda key: params), built.parts
            return train_state.make_init(network, built.optimizer, p.times, p.process)(jax.random.key(SEED))

        return begin(self.params)

    def _copied(self) -> Any:
        """The weights on the device; never the host's own memory, which a step would write to."""
        return jax.tree.map(jnp.array, self.params)

    def _forward(self, batch: int, variant: str):
        built, given = self._program(batch, variant), cases.inputs(self.work, batch)
        p, net = built.parts.process, built.parts.network

        def forward(params, x, t, label):
            return net.apply(params, *p.network_inputs(x, t), {"label": label} if net.num_classes else {})

        arguments = (self._copied(), *(jnp.asarray(given[k]) for k in ("x", "t", "label")))
        jitted: Any = lowering.jit(forward)
        with placement.tracing_for(built.mesh):
            traced = jitted.trace(*arguments)
        compiled = traced.lower().compile()

        def run(n: int) -> None:
            for _ in range(n):
                self.last = compiled(*arguments)
            jax.block_until_ready(self.last)

        return Prepared(run, 1, _bytes(compiled)), flops.count(traced.jaxpr)

    def _sample(self, batch: int, variant: str):
        built, classes = self._program(batch, variant), self.work.about.classes
        names = tuple(map(str, range(classes)))
        model = models.make(built.config, self._copied(), built.shape, names, 0, built.parts)
        table, guidance = model.default_table(), self.work.about.guidance
        labels = cases.inputs(self.work, batch)["label"] if classes else None
        key, clip = jax.random.key(SEED), built.config.sampling.clip

        def run(n: int) -> None:
            for _ in range(n):  # each waits: samples come back as NumPy arrays
                self.last = model.sample(
                    key, table, batch, labels=labels, guidance=guidance, batch_size=batch, clip=clip, mesh=built.mesh
                )

        keys = noise.sample_keys(key, jnp.arange(batch))
        self.begin = np.asarray(noise.normal(keys, 0, built.shape)) * np.float32(table.scale)
        _, work = self._count(built, batch * (2 if guidance != 1 else 1))
        return Prepared(run, 1, 0), work * len(table)

    def _count(self, built: program.Program, batch: int):
        """FLOPs of one evaluation of the network."""
        shape = jax.ShapeDtypeStruct((batch, *built.shape), jnp.float32)
        one = jax.ShapeDtypeStruct((batch,), jnp.float32)
        cond = {"label": jax.ShapeDtypeStruct((batch,), jnp.int32)} if built.num_classes else {}
        traced = jax.jit(built.parts.network.apply).trace(self.params, shape, one, cond)
        return traced, flops.count(traced.jaxpr)

    def output(self, key: str) -> str:
        """The last output of what was prepared last: of forward, or the samples and the noise they began with."""
        extra = {"begin": self.begin} if self.work.mode == "sample" else {}
        return self._save("output", output=jax.device_get(self.last), **extra)

    def run(self, key: str, steps: int) -> float:
        """Seconds for `steps` steps, a multiple of what one call does."""
        ready = self.prepared[key]
        if steps % ready.per_call:
            raise UserError(f"--steps={steps}: {key} does {ready.per_call} at a time")
        started = time.perf_counter()
        ready.run(steps)
        return time.perf_counter() - started

    def restart_peak(self) -> None:
        worker.restart_peak()

    def peak(self) -> int:
        """Bytes: of the accelerator since the process began, of a CPU's process since `restart_peak`."""
        if jax.default_backend() == "cpu":
            return worker.peak_memory()
        return int((jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0))

    def drop(self, key: str) -> None:
        self.prepared.pop(key, None)

    def _save(self, name: str, **arrays: np.ndarray) -> str:
        path = self.folder / f"jax_{name}.npz"
        np.savez(path, **{k: np.asarray(v, np.float32) for k, v in arrays.items()})
        return str(path)


def weights(shapes: Any, head: float) -> Any:
    """Parameters as NumPy arrays, of about the size that training gives them, and none at its initial value: a zero
    kernel would agree with any other. Not the network's own: to compile those takes as long as the network.

    head: a factor of its own, small for sampling: a solver divides the prediction by alpha, and of an untrained
        network that is chaos, in which rounding errors grow to the size of the samples within 50 steps.
    """
    rng = np.random.default_rng(SEED)

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape, np.float32)
        name = sharding.path_name(path)
        if name.endswith("kernel"):
            noise *= np.float32(head if name.startswith("head") else 1)
            return noise / np.float32(np.sqrt(np.prod(leaf.shape[-4 if leaf.ndim == 4 else -2 : -1])))
        noise *= np.float32(0.02 * (head if name.startswith("head") else 1))
        return np.float32(name.endswith("scale")) + noise

    return jax.tree_util.tree_map_with_path(draw, shapes)


def _bytes(compiled: Any) -> int:
    """Arguments, results and scratch of a compiled program, what is updated in place counted once."""
    m = compiled.memory_analysis()
    if m is None:
        return 0
    return int(m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes)
