"""One mesh, three axes: data (replicas), fsdp (shards of the state), tensor (shards of a matmul).

The batch is split over data x fsdp. Parameters, moments and EMA follow one list of rules from a path regex to
a spec, so they always lie alike. All of it works unchanged on one CPU.

Tensor parallelism is Megatron's (Shoeybi et al. 2019, section 3): of each two matrices of a transformer block the
first is split by its outputs (heads, hidden features) and the second by its inputs, so that the block's activations
are summed twice, once after each pair, and otherwise stay where they are.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jax_diffusion.errors import UserError, choose

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")

# Specs by name, of leaves [..., inputs, outputs]; leading axes (a stack's layers) stay whole. A spec may also be a
# tuple that names a mesh axis, several of them, or None for each axis of the leaf.
SPECS: dict[str, tuple | None] = {
    "largest": None,  # the largest axis that divides, over fsdp
    "replicated": None,
    "columns": ("fsdp", "tensor"),  # outputs split: the first matrix of a pair
    "rows": ("tensor", "fsdp"),  # inputs split: the second
    "features": ("tensor",),  # the bias of "columns"
    "inputs": (("tensor", "fsdp"), None),  # inputs split over both: how a matrix is kept that is cut otherwise in use
    "fsdp_inputs": ("fsdp", None),
}

Rules = Sequence[str | tuple[str, str | tuple]]  # (regex searched in the path of a leaf, spec), or a name in RULES

# The blocks of DiT and U-ViT. q, k and v lie side by side in the outputs of one matrix, so that a cut of these would
# not be one of heads.
_BLOCK = r"(^|/)(\w*stack|middle)/"
# Looked up by row, a table of labels cut by features would have its rows sent about.
_TABLE = ("(^|/)label/embedding$", "replicated")
# On TPU that matrix is used in thirds of its outputs (attention.project_qkv): cut along them, they would be sent about.
_QKV = ("(^|/)qkv/kernel$", "fsdp_inputs"), ("(^|/)qkv/bias$", "replicated")
RULES: dict[str, Rules] = {
    "largest": (_TABLE, *_QKV, (".*", "largest")),
    "tensor": (
        (_BLOCK + "attention/qkv/kernel$", "inputs"),
        (_BLOCK + "(attention/out|mlp/down)/kernel$", "rows"),
        (_BLOCK + "(mlp/up|modulation)/kernel$", "columns"),
        (_BLOCK + "(mlp/up|modulation)/bias$", "features"),
        _TABLE,
        (".*", "largest"),
    ),
    "auto": (),  # "tensor" where mesh.tensor is more than 1, else "largest"
}
DEFAULT_RULES: Rules = ("auto",)

# Leaves of the layers of a scan (models/transformer.py), whose first axis "largest" leaves whole: cut along it, a scan
# would fetch every layer from one device.
STACKED = re.compile(r"(^|/)(\w+_)?stack/")


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence | None = None) -> Mesh:
    """A mesh over all devices; one size may be -1, "whatever is left". Raises UserError where it does not fit.

    Of several TPU slices the data axis lies across the slow network between them, and fsdp and tensor within each. On
    other clusters devices are taken host by host, which comes to the same.
    """
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
    types = (AxisType.Auto,) * len(AXES)
    if len({getattr(d, "slice_index", 0) for d in devices}) > 1:
        return Mesh(across_slices(tuple(sizes.values()), devices), AXES, axis_types=types)
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=types, devices=devices)


def across_slices(sizes: tuple[int, ...], devices: Sequence) -> np.ndarray:
    """Devices of several slices as [data, fsdp, tensor], neighbours along fsdp and tensor in one slice.

    Where data is too small for that, fsdp goes across as well; tensor never does. Raises UserError where it would.
    """
    slices = len({d.slice_index for d in devices})
    data, fsdp, tensor = sizes
    outer = math.gcd(data, slices)
    rest = slices // outer
    if fsdp % rest:
        raise UserError(
            f"mesh.data={data}, mesh.fsdp={fsdp}, mesh.tensor={tensor} over {slices} slices would cut matmuls across "
            f"the network between them: make mesh.data a multiple of {slices}"
        )
    within = (data // outer, fsdp // rest, tensor)
    return mesh_utils.create_hybrid_device_mesh(within, (outer, rest, 1), devices, allow_split_physical_axes=True)


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
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


def path_name(path: tuple) -> str:
    """A pytree path as text, "params/down/0/conv1/kernel"."""
    return "/".join(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)


def _resolved(rules: Rules, mesh: Mesh) -> Iterator[tuple[str, str | tuple]]:
    """The rules with named sets written out, in order."""
    for rule in rules:
        if not isinstance(rule, str):
            yield rule
            continue
        name = choose("mesh.rules", rule, RULES)
        if name == "auto":
            name = "tensor" if mesh.shape["tensor"] > 1 else "largest"
        yield from RULES[name]  # type: ignore[misc]  # which name no other set


def spec_of(name: str, shape: tuple[int, ...], mesh: Mesh, rules: Rules) -> PartitionSpec:
    """The spec of the first rule whose regex is found in `name`; replicated where none is."""
    rule = next((spec for pattern, spec in _resolved(rules, mesh) if re.search(pattern, name)), "replicated")
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
    if isinstance(rule, str) and rule in SPECS and (spec := SPECS[rule]) is not None and len(spec) <= len(shape):
        rule = (None,) * (len(shape) - len(spec)) + spec
    if isinstance(rule, str) or len(rule) != len(shape):
        raise UserError(
            f"mesh.rules: {rule!r} for {name} (shape {shape}) is no spec: use one of {', '.join(SPECS)}, or one "
            f"of {', '.join(AXES)} or None per axis"
        )
    return PartitionSpec(*(_cut(name, shape, mesh, i, axes) for i, axes in enumerate(rule)))


def _cut(name: str, shape: tuple[int, ...], mesh: Mesh, i: int, axes: str | tuple | None) -> str | tuple | None:
    """The mesh axes that axis i of a leaf is cut over: those asked for that divide it. A matmul must divide."""
    kept, parts = [], 1
    for axis in (axes,) if isinstance(axes, str) else axes or ():
        size = mesh.shape[choose("mesh.rules: axis", axis, AXES)]
        if shape[i] % (parts * size) == 0:
            kept.append(axis)
            parts *= size
        elif axis == "tensor":
            raise UserError(
                f"mesh.tensor={size} does not divide the {shape[i]} features of {name} {shape}: use a divisor of both"
            )
    return tuple(kept) if len(kept) > 1 else kept[0] if kept else None


def abstract(tree: Any, shardings: Any) -> Any:
    """The shapes and types of a pytree, placed: what compiling and restoring are told."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def tree_shardings(mesh: Mesh, tree: Any, rules: Rules = DEFAULT_RULES) -> Any:
    """A NamedSharding for each leaf of a (possibly abstract) pytree."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec_of(path_name(path), leaf.shape, mesh, rules)), tree
    )


def check_tensor(mesh: Mesh, placed: Any, network: str, least: float = 0.1) -> None:
    """Raises UserError where a mesh has a tensor axis on which less than the share `least` of a network's parameters
    (abstract, placed) lies: its devices would do the rest twice."""
    leaves = jax.tree.leaves(placed)
    split = sum(x.size for x in leaves if "tensor" in str(x.sharding.spec))
    if mesh.shape["tensor"] > 1 and split < least * sum(x.size for x in leaves):
        raise UserError(
            f"mesh.tensor={mesh.shape['tensor']}: mesh.rules split hardly a parameter of {network} over tensor, and "
            "its devices would repeat each other's work: use mesh.fsdp instead, or a transformer (dit, uvit) with "
            "mesh.rules=auto, or rules of your own"
        )


def replication_note(mesh: Mesh, tree: Any, rules: Rules = DEFAULT_RULES, least: float = 0.01) -> str:
    """One line where more than the share `least` of a state, and 16 MB, stays whole although mesh.fsdp > 1; else "".

    tree: the state, of arrays or their shapes.
    """
    leaves = [(path_name(p), x) for p, x in jax.tree_util.tree_leaves_with_path(tree)]
    total = sum(x.size * x.dtype.itemsize for _, x in leaves)

    def whole(mesh: Mesh) -> list:
        """(bytes, name, shape) of what no axis of the mesh cuts, the largest first."""
        specs = ((x, name, spec_of(name, x.shape, mesh, rules)) for name, x in leaves)
        uncut = [(x.size * x.dtype.itemsize, name, x.shape) for x, name, spec in specs if not any(spec)]
        return sorted(uncut, reverse=True)

    found = whole(mesh)
    size = sum(n for n, *_ in found)
    fsdp = mesh.shape["fsdp"]
    if fsdp == 1 or size <= max(least * total, 16e6):
        return ""
    better = next((n for n in range(fsdp - 1, 1, -1) if fsdp % n == 0
                   and sum(b for b, *_ in whole(_resized(mesh, n))) <= least * total), None)  # fmt: skip
    data = mesh.shape["data"]
    remedy = (
        f"mesh.fsdp={better} with mesh.data={data * fsdp // better} cuts it" if better else "use a smaller mesh.fsdp"
    )
    _, name, shape = found[0]
    return (
        f"warning: {size / 1e6:,.1f} MB of the state's {total / 1e6:,.1f} stay whole on every device: no axis of "
        f"{len(found)} leaves ({name} {'x'.join(map(str, shape))} the largest) divides by mesh.fsdp={fsdp}; {remedy}"
    )


def _resized(mesh: Mesh, fsdp: int):
    """A mesh's sizes with another fsdp and the rest as replicas: what spec_of asks for."""
    return AbstractMesh((mesh.size // fsdp // mesh.shape["tensor"], fsdp, mesh.shape["tensor"]), AXES)
