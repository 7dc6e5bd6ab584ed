"""Small sets that live on the devices: the host sends indices, and each batch is gathered there.

What is gathered is bit for bit what the host would have sent, on any mesh. "replicate" puts the whole set on every
device, and gathering needs no communication. "shard" cuts it over the axes that cut the batch: every device looks up
all indices in its own rows, and the rows found travel to where they belong (a reduce-scatter, as bytes of one batch).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jax_diffusion.data.source import ArraySource, Source
from jax_diffusion.errors import UserError, choose
from jax_diffusion.progress import Progress

MODES = ("auto", "never", "replicate", "shard")
SMALL = 1 << 30  # bytes on each device up to which "auto" replicates: a little of any accelerator's memory
CHUNK = 1024  # examples read at a time from a set that is no array


def choose_mode(said: str, source: Source, platform: str) -> str:
    """ "never", "replicate" or "shard" for config.data.on_device. "auto" replicates uint8 arrays of at most 1 GiB
    on accelerators: on a CPU the devices' memory is the host's, and nothing would be saved."""
    choose("config.data.on_device", said, MODES)
    if said != "auto":
        return said
    if platform == "cpu" or not isinstance(source, ArraySource):
        return "never"
    one = source.batch(np.zeros(1, int))
    small = len(source) * sum(leaf.nbytes for leaf in one.values()) <= SMALL
    return "replicate" if small and one["image"].dtype == np.uint8 else "never"


def load(source: Source, said: str, sharding: NamedSharding, say: Callable[[str], None]) -> "Resident | None":
    """The set on the devices, if config.data.on_device wants it there; `say` is told. None: the host sends batches.

    Raises:
      UserError: an unknown mode, or the devices' memory does not hold the set.
    """
    platform = sharding.mesh.devices.flat[0].platform
    mode = choose_mode(said, source, platform)
    if mode == "never":
        return None
    try:
        made = Resident(source, sharding, mode)
        jax.block_until_ready(made.table)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"config.data.on_device={said!r}: the devices' memory does not hold {source.name}; "
            "set --config.data.on_device=shard or never"
        ) from error
    how = "on every device" if mode == "replicate" else f"in {made.parts} parts"
    say(f"{source.name}: {len(source):,} examples, {made.bytes / 2**20:,.1f} MiB, lie on the devices ({how}); the host "
        "sends indices (config.data.on_device)")  # fmt: skip
    return made


class Resident:
    """A set on the devices. `table`: {"image": [N', H W C], "label": [N']}, N' >= N padded to divide over the shards.

    An example is one row: a TPU would store [N, 32, 32, 3] with the 3 padded to 128.
    """

    def __init__(self, source: Source, sharding: NamedSharding, mode: str):
        """sharding: of the batches wanted, [B, ...] or [K, B, ...]; its last named axis is B's."""
        self.sharding = sharding
        mesh, self._axes = sharding.mesh, sharding.spec[-1]
        self._lead = len(sharding.spec) - 1
        axes = (self._axes,) if isinstance(self._axes, str) else tuple(self._axes)
        self.parts = int(np.prod([mesh.shape[a] for a in axes])) if mode == "shard" else 1
        sharded = self.parts > 1
        placed = NamedSharding(mesh, PartitionSpec(self._axes if sharded else None))
        self._indices = NamedSharding(mesh, PartitionSpec()) if sharded else sharding
        arrays = contents(source)
        self.bytes = sum(a.nbytes for a in arrays.values())
        self.table = {key: _spread(_rows(a), placed, self.parts) for key, a in arrays.items()}
        shapes, gather = {key: a.shape[1:] for key, a in arrays.items()}, self._exchange if sharded else _take

        def batch(table: dict[str, jax.Array], indices: jax.Array) -> dict[str, jax.Array]:
            return {k: rows.reshape(*indices.shape, *shapes[k]) for k, rows in gather(table, indices).items()}

        self._gather = jax.jit(batch, out_shardings=sharding)

    def place(self, indices: np.ndarray) -> jax.Array:
        """Global indices, int32 [B] or [K, B] and the same on every process, to where `gather` wants them."""
        return jax.make_array_from_callback(indices.shape, self._indices, lambda part: indices[part])

    def gather(self, indices: jax.Array) -> dict[str, jax.Array]:
        """The batch of placed indices. One small program; it waits for nothing."""
        return self._gather(self.table, indices)

    def _exchange(self, table: dict[str, jax.Array], indices: jax.Array) -> dict[str, jax.Array]:
        take = functools.partial(_take_and_scatter, axes=self._axes, batch_axis=self._lead)
        specs = PartitionSpec(self._axes), PartitionSpec()
        return jax.shard_map(take, mesh=self.sharding.mesh, in_specs=specs, out_specs=self.sharding.spec)(
            table, indices
        )


def _take(table: dict[str, jax.Array], indices: jax.Array) -> dict[str, jax.Array]:
    return {key: jnp.take(a, indices, axis=0, mode="clip") for key, a in table.items()}


def _take_and_scatter(table: dict[str, jax.Array], indices: jax.Array, *, axes: Any, batch_axis: int):
    """On each device: all of the batch's rows that lie here, zeros for the rest; of their sum each keeps its part."""
    out = {}
    for key, a in table.items():
        local = indices - jax.lax.axis_index(axes) * a.shape[0]
        here = (local >= 0) & (local < a.shape[0])
        # As integers: 0 + -0.0 is not -0.0.
        whole = jax.lax.bitcast_convert_type(a, f"uint{8 * a.dtype.itemsize}")
        rows = jnp.take(whole, local, axis=0, mode="clip")
        rows = jnp.where(here.reshape(*here.shape, *(1,) * (rows.ndim - here.ndim)), rows, 0)
        rows = jax.lax.psum_scatter(rows, axes, scatter_dimension=batch_axis, tiled=True)
        out[key] = jax.lax.bitcast_convert_type(rows, a.dtype)
    return out


def contents(source: Source) -> dict[str, np.ndarray]:
    """All of a set: {"image": [N, ...], "label": int32 [N]}; without a copy where it is one array."""
    if type(source) is ArraySource and source.rows is None and isinstance(source.images, np.ndarray):
        return {"image": source.images} | ({} if source.labels is None else {"label": source.labels})
    n, progress, out = len(source), Progress(f"reading {source.name}", len(source)), {}
    for start in range(0, n, CHUNK):
        stop = min(start + CHUNK, n)
        for key, leaf in source.batch(np.arange(start, stop)).items():
            if key not in out:
                out[key] = np.empty((n, *leaf.shape[1:]), leaf.dtype)
            out[key][start:stop] = leaf
        progress.add(stop - start)
    return out


def _rows(array: np.ndarray) -> np.ndarray:
    return array.reshape(len(array), -1) if array.ndim > 1 else array


def _spread(array: np.ndarray, sharding: NamedSharding, parts: int) -> jax.Array:
    """An array [N, ...] onto the devices; zeros fill it up to a multiple of `parts`. Every process has all of it."""
    n = -(-len(array) // parts) * parts

    def part(index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[0].indices(n)
        rows = np.asarray(array[start:stop])
        fill = np.zeros((stop - start - len(rows), *array.shape[1:]), array.dtype)
        return np.concatenate([rows, fill]) if len(fill) else rows

    return jax.make_array_from_callback((n, *array.shape[1:]), sharding, part)  # type: ignore[arg-type]
