"""A checksum of every leaf of a pytree, computed where the leaf lies.

With bits b_i of element i as an unsigned integer and a hash h that is one to one on 32 bits,

    sum = (h(b_0 ^ h(0)) + h(b_1 ^ h(1)) + ...) mod 2^32.

A change of one element always changes the sum; anything else, elements that change places say, goes unnoticed once in
2^32. It does not depend on how a leaf is cut into shards, so that a checkpoint written by 8 devices of 2 processes is
checked on one, and nothing but the sums leaves the devices.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_diffusion.sharding import path_name

# Programs under way: a CPU device takes no more than 32, and one that has no room lets the others wait for it for ever.
AT_ONCE = 16
_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


@jax.jit
def _sum(x: jax.Array) -> jax.Array:
    """uint32 []."""
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32)
    index, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * np.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    return jnp.sum(_hash(bits ^ _hash(index)), dtype=jnp.uint32)


def _hash(x: jax.Array) -> jax.Array:
    """Each step can be undone: xor with a shift, and a product with an odd number."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def of_tree(tree: Any) -> dict[str, int]:
    """path -> sum of every leaf. Of several processes all have to call it, and all get the same."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sums = []
    for first in range(0, len(leaves), AT_ONCE):
        sums += jax.device_get([_sum(leaf) for _, leaf in leaves[first : first + AT_ONCE]])
    return {path_name(path): int(s) for (path, _), s in zip(leaves, sums, strict=True)}
