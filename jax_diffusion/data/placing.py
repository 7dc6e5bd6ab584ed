"""Host arrays onto the devices of a sharding, by one process or by several of which each has its part."""

import jax
import numpy as np


def local_rows(sharding: jax.sharding.Sharding, shape: tuple[int, ...], axis: int) -> np.ndarray:
    """Rows of `axis` of a global array of `shape` on this process's devices, ascending and once each."""
    parts = [s for s in sharding.addressable_devices_indices_map(shape).values() if s is not None]
    slices = {s[axis].indices(shape[axis]) for s in parts}
    return np.unique(np.concatenate([np.arange(*s) for s in slices]))


def place(
    leaves: dict[str, np.ndarray], lead: tuple[int, ...], sharding: jax.sharding.Sharding | None
) -> dict[str, jax.Array]:
    """Puts this process's part of each leaf on its devices; `lead` is the global [B] or [K, B]."""
    if sharding is not None and len(lead) == 2 and sharding.shard_shape(lead)[0] != lead[0]:
        raise ValueError(f"the steps axis of a [K, B, ...] batch cannot be sharded, but {sharding} does")
    if jax.process_count() > 1:
        shapes = {key: (*lead, *leaf.shape[len(lead) :]) for key, leaf in leaves.items()}
        return {k: jax.make_array_from_process_local_data(sharding, leaves[k], shapes[k]) for k in leaves}
    return jax.device_put(leaves, sharding)  # in one call: its Python costs more than the copy of a small batch
