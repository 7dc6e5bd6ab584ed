"""The programs of a run, traced for devices that need not exist, and what is compiled from them, kept in a folder."""

import functools
import gzip
import hashlib
import importlib.metadata
import json
import pathlib
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_diffusion import config as configs
from jax_diffusion import experiment, model, placement, sharding
from jax_diffusion.errors import UserError
from jax_diffusion.guidance import model as guiding
from jax_diffusion.plan import targets
from jax_diffusion.train import program


def train(config: configs.ConfigDict, shape: tuple[int, ...], classes: int, mesh) -> tuple[program.Program, Any]:
    """The trainer's program of one step and its trace, a jax.stages.Traced."""
    built = program.build(config, shape, classes, mesh)
    return built, built.trace(_batch(built))


def _batch(built: program.Program) -> dict[str, jax.ShapeDtypeStruct]:
    """One batch: pictures come as bytes, points and latents as float32."""
    batch = built.abstract_batch()
    if len(built.shape) != 3 or built.shape[-1] not in (1, 3):
        batch["image"] = jax.ShapeDtypeStruct(batch["image"].shape, jnp.float32)
    return batch


def state_bytes(built: program.Program) -> dict[str, int]:
    """What one device holds of a training run before any step: bytes of parameters, moments, EMA and a batch."""
    state, _ = built.abstract_state()
    share = sharding.batch_shards(built.mesh)
    return {
        "parameters": shard_bytes(state.params),
        "moments": shard_bytes(state.opt_state),
        "ema": shard_bytes((state.ema, state.averages)),
        "batch": sum(x.size * x.dtype.itemsize for x in _batch(built).values()) // share,
    }


def shard_bytes(tree: Any) -> int:
    """What one device holds of a placed, abstract tree."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape), dtype=np.int64)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def sampler(config: configs.ConfigDict, shape: tuple[int, ...], classes: int, mesh, batch: int) -> tuple[int, Any]:
    """(bytes of the parameters, trace) of the recipe's sampling of `batch` samples: its solver, steps and guidance."""
    parts = experiment.build(config, shape, classes)
    made = model.make(config, None, shape, tuple(map(str, range(classes))), 0, parts,
                      mesh.devices.flat[0].platform)  # fmt: skip
    cond = {"label": np.zeros(batch, np.int32)} if classes else {}
    if parts.condition is not None:
        cond["image"] = np.zeros((batch, *shape[:-1], parts.condition.channels), np.float32)
    s = config.sampling
    samples, shared = guiding.request(batch, cond, classes, s.guidance, None, None, s.threshold or None)

    def placed(tree, where):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.asarray(x).dtype, sharding=where), tree)

    whole, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
        jax.eval_shape(parts.network.init, jax.random.key(0)),
    )
    key = jax.ShapeDtypeStruct((), jax.eval_shape(lambda: jax.random.key(0)).dtype, sharding=whole)
    generate: Any = made.generate
    with placement.tracing_for(mesh):
        return shard_bytes(params), generate.trace(
            params, key, placed(made.default_table(), whole), placed(np.zeros(batch, np.int32), split),
            placed(samples, split), placed(shared, whole), {},
            shape=made.shape, clip=s.clip, trajectory=False, weak=None,
        )  # fmt: skip


class Compiled(NamedTuple):
    """A compiled program, as text and figures of one device. Without text it does not fit the device's memory."""

    hlo: str
    memory: dict[str, int]  # bytes: argument, output, alias, temp, generated_code; or {"needed"} where it does not fit
    cost: dict[str, float]  # XLA's own "flops" and "bytes accessed", in which loops count once; {} on GPUs
    seconds: float  # that compiling took

    @property
    def fits(self) -> bool:
        return bool(self.hlo)

    @property
    def bytes(self) -> int:
        """Of memory at its peak."""
        m = self.memory
        if "needed" in m:
            return m["needed"]
        return m["argument"] + m["output"] - m["alias"] + m["temp"] + m["generated_code"]


# Nothing can be timed on an absent GPU, and XLA's own matmul kernels want tuning: untuned ones may not even compile.
# On a GPU most large products of bfloat16 end at cuBLAS.
OPTIONS = {"cuda": {"xla_gpu_enable_triton_gemm": False}}

_SIZES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_NEEDED = re.compile(r"Used ([\d.]+)([KMGT]?) of |\(([\d.]+)([KMGT]?)\) exceeds available")


def needed(message: str) -> int | None:
    """The bytes that a compiler says a program would take; None where the message is of something else.

    Where only the temporaries of a program are too many already, it names those alone.
    """
    if "RESOURCE_EXHAUSTED" not in message or not (found := _NEEDED.search(message)):
        return None
    return int(float(found[1] or found[3]) * _SIZES[found[2] or found[4] or ""])


@functools.cache
def versions() -> str:
    """Of all that decides what is compiled."""
    found = []
    for name in ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def compile(traced: Any, target: str, cache: pathlib.Path | None = None) -> Compiled:
    """Compiles for the topology `target`, or reads what that once gave from the folder `cache`.

    JAX's own cache of compiled programs does not hold those of absent devices.
    """
    lowered = traced.lower()
    options = OPTIONS.get(targets.parse(target).family)
    key = hashlib.sha256("\0".join((lowered.as_text(), target, versions(), str(options))).encode()).hexdigest()[:32]
    path = cache / f"{key}.json.gz" if cache else None
    if path and path.exists():
        return Compiled(**json.loads(gzip.decompress(path.read_bytes())))
    made = _compile(lowered, target, options)
    if cache and path:
        cache.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{time.time_ns()}")
        draft.write_bytes(gzip.compress(json.dumps(made._asdict()).encode(), 6))
        draft.replace(path)
    return made


def _compile(lowered: Any, target: str, options: dict[str, Any] | None) -> Compiled:
    began = time.perf_counter()
    try:
        done = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as e:
        size = needed(str(e))
        if size is None:
            raise UserError(f"--topology={target}: its compiler refuses the program: {str(e).splitlines()[0]}") from e
        return Compiled("", {"needed": size}, {}, time.perf_counter() - began)
    stats, cost = done.memory_analysis(), done.cost_analysis() or {}
    memory = {
        name: int(getattr(stats, f"{name}_size_in_bytes"))
        for name in ("argument", "output", "alias", "temp", "generated_code")
    }
    cost = {name: float(cost[name]) for name in ("flops", "bytes accessed") if name in cost}
    return Compiled(done.as_text(), memory, cost, time.perf_counter() - began)
