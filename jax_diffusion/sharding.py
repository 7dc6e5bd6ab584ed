"""One mesh, three axes: data (replicas), fsdp (shards of the state), tensor (shards of a matmul).

The batch is split over data x fsdp. Parameters, moments and EMA follow one list of rules from a path regex to
a spec, so they always lie alike. All of it works unchanged on one CPU.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_diffusion.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")

# (regex searched in the path of a leaf, spec): "largest" shards the leaf's largest divisible axis over fsdp;
# "replicated" keeps it whole; a tuple names a mesh axis or None for each axis of the leaf.
Rules = Sequence[tuple[str, str | tuple]]
DEFAULT_RULES: Rules = ((".*", "largest"),)

# Leaves of the layers of a scan (models/transformer.py), whose first axis "largest" leaves whole: cut along it, a scan
# would fetch every layer from one device.
STACKED = re.compile(r"(^|/)(\w+_)?stack/")


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence | None = None) -> Mesh:
    """A mesh over all devices; one size may be -1, "whatever is left". Raises UserError where it does not fit."""
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    said = ", ".join(f"mesh.{k}={v}" for k, v in sizes.items())
    if any(v == 0 or v < -1 for v in sizes.values()) or list(sizes.values()).count(-1) > 1:
        raise UserError(f"{said}: sizes are positive, and at most one may be -1 (the rest of the devices)")
    known = int(np.prod([v for v in sizes.values() if v != -1]))
    if -1 in sizes.values():
        sizes = {k: len(devices) // known if v == -1 else v for k, v in sizes.items()}
    if int(np.prod(list(sizes.values()))) != len(devices):
        raise UserError(
            f"{said} does not use the {len(devices)} devices here exactly: set one of them to -1, or choose "
            f"sizes whose product is {len(devices)}"
        )
    # Auto, not Explicit: under Explicit, FSDP convolutions do not trace.
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts the batch is cut."""
    return int(np.prod([mesh.shape[a] for a in BATCH]))


def check_batch(mesh: Mesh, batch_size: int, accumulate: int = 1, option: str = "train.batch_size") -> None:
    """Raises UserError unless every microbatch divides over the mesh."""
    parts = batch_shards(mesh) * accumulate
    if batch_size < 1 or batch_size % parts:
        low = max(parts, batch_size // parts * parts)
        raise UserError(
            f"{option}={batch_size} does not divide over {batch_shards(mesh)} devices"
            f"{f' x {accumulate} accumulation steps' if accumulate > 1 else ''}: "
            f"use a multiple of {parts}, for instance {low}"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """[B, ...] split over data x fsdp; `leading` axes (a scan's steps) before B stay whole."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading, BATCH))


def activation_constraint(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """Keeps activations split by batch alone. Without it FSDP makes XLA split features, at three times the
    collectives (measured: 55 against 18 on a U-Net step)."""
    if mesh.size == 1:
        return lambda x: x
    sharding = NamedSharding(mesh, PartitionSpec(BATCH))

    def constrain(x):
        # Odd batches (a lone sample) are left to XLA.
        return jax.lax.with_sharding_constraint(x, sharding) if x.shape[0] % batch_shards(mesh) == 0 else x

    return constrain


def path_name(path: tuple) -> str:
    """A pytree path as text, "params/down/0/conv1/kernel"."""
    return "/".join(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)


def spec_of(name: str, shape: tuple[int, ...], mesh: Mesh, rules: Rules) -> PartitionSpec:
    """The spec of the first rule whose regex is found in `name`; replicated where none is."""
    rule = next((spec for pattern, spec in rules if re.search(pattern, name)), "replicated")
    if rule == "replicated" or not shape:
        return PartitionSpec()
    if rule == "largest":
        parts = mesh.shape["fsdp"]
        whole = 1 if STACKED.search(name) else 0
        axes = [i for i, n in enumerate(shape) if i >= whole and n % parts == 0 and n >= parts]
        if parts == 1 or not axes:
            return PartitionSpec()
        # Of equal axes the last: output features, which every layout keeps contiguous.
        axis = max(axes, key=lambda i: (shape[i], i))
        return PartitionSpec(*(None,) * axis, "fsdp")
    if isinstance(rule, str) or len(rule) != len(shape):
        raise UserError(
            f"mesh.rules: {rule!r} for {name} (shape {shape}) is no spec: use 'largest', 'replicated' or one "
            f"of {', '.join(AXES)} or None per axis"
        )
    return PartitionSpec(*rule)


def abstract(tree: Any, shardings: Any) -> Any:
    """The shapes and types of a pytree, placed: what compiling and restoring are told."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def tree_shardings(mesh: Mesh, tree: Any, rules: Rules = DEFAULT_RULES) -> Any:
    """A NamedSharding for each leaf of a (possibly abstract) pytree."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec_of(path_name(path), leaf.shape, mesh, rules)), tree
    )
