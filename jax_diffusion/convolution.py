"""Convolutions by the fastest implementation of the platform that a program is compiled for.

Within lowering.onednn() x86 CPUs have oneDNN's: jaxlib holds the library and the operation of XLA that calls it, and
lacks only the pass that would write that operation into a program, so it is written here. What the operation does not
do is XLA's: strides, other types.
"""

import functools
import json
import math
import platform
from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from jax_diffusion import lowering

NHWC = ("NHWC", "HWIO", "NHWC")
_plain = functools.partial(jax.lax.conv_general_dilated, window_strides=(1, 1), dimension_numbers=NHWC)

# Operations, of additions and products, below which a call of oneDNN costs more than it saves: 0.1 ms.
LEAST = 1.3e8

# The operation is not part of jaxlib's interface: what it is told was tried with these versions, and a wrong word ends
# the process.
_TRIED = (0, 10), (0, 13)

Pads = tuple[tuple[int, int], tuple[int, int]]


def convolve(x: jax.Array, kernel: jax.Array, strides, padding, **options) -> jax.Array:
    """lax.conv_general_dilated of [B, H, W, C] and [h, w, C, D], in the form that nnx.Conv calls.

    By oneDNN its derivatives are of reverse mode only, but within lowering.differentiable_forward().
    """
    if not _takes(x, kernel, strides, padding, options):
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
    pads = tuple(map(tuple, padding))
    ours, plain = functools.partial(_onednn, pads), functools.partial(_plain, padding=pads)
    return jax.lax.platform_dependent(x, kernel, cpu=ours, default=plain)


def _takes(x, kernel, strides, padding, options) -> bool:
    """Of one device: XLA cannot cut the operation over several."""
    if not lowering.by_onednn() or lowering.target() != "cpu" or lowering.forward_mode() or isinstance(padding, str):
        return False
    changed = {k: v for k, v in options.items() if v is not None and k != "dimension_numbers"}
    return available() and (
        x.ndim == kernel.ndim == 4
        and x.dtype == kernel.dtype == jnp.float32
        and all(high < size and low < size for (low, high), size in zip(padding, kernel.shape, strict=False))
        and tuple(strides) == (1, 1)
        and all(np.all(np.asarray(v) == 1) for v in changed.values())
    )


@functools.cache
def available() -> bool:
    """Whether this process computes on one x86 CPU with a jaxlib whose oneDNN agrees with XLA."""
    import jaxlib

    version = tuple(map(int, jaxlib.__version__.split(".")[:2]))
    if platform.machine() not in ("x86_64", "AMD64") or not _TRIED[0] <= version < _TRIED[1]:
        return False
    if jax.default_backend() != "cpu" or jax.device_count() != 1:
        return False
    pads = ((1, 0), (1, 1))
    x = np.arange(2 * 5 * 6 * 3, dtype=np.float32).reshape(2, 5, 6, 3) % 7
    kernel = np.arange(2 * 3 * 3 * 4, dtype=np.float32).reshape(2, 3, 3, 4) % 5
    with jax.ensure_compile_time_eval():
        try:
            ours = jax.jit(functools.partial(_call, pads))(x, kernel)
        except Exception:  # a build without it
            return False
        theirs = _plain(jnp.asarray(x), jnp.asarray(kernel), padding=pads)
        return np.array_equal(ours, theirs)  # small whole numbers: exactly


# Both products of which derivatives are taken, each the other's gradient, so that there are derivatives of any order.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _onednn(pads: Pads, x: jax.Array, kernel: jax.Array) -> jax.Array:
    if 2 * math.prod(x.shape[:3]) * kernel.size < LEAST:
        return _plain(x, kernel, padding=pads)
    return _call(pads, x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _of_kernel(pads: Pads, x: jax.Array, gradient: jax.Array) -> jax.Array:
    """The gradient of the kernel.

    XLA has no operation for oneDNN's own, but it is a convolution too, of one volume by another,

        dK[a, b, c, d] = sum_{h, w, n} x[h + a, w + b, c; n] g[h, w, 0; n, d],

    whose axes are height, width and input channels, and whose channels are the batch. As one of planes, with the input
    channels for a batch, oneDNN's was no faster than XLA's (docs/benchmarks.md).
    """
    volume, window = x.transpose(1, 2, 3, 0)[None], gradient.transpose(1, 2, 0, 3)[:, :, None]
    return _call((*pads, (0, 0)), volume, window)[0]


def _of_input(pads: Pads, gradient: jax.Array, kernel: jax.Array) -> jax.Array:
    """The gradient of the input."""
    around = tuple((size - 1 - low, size - 1 - high) for (low, high), size in zip(pads, kernel.shape, strict=False))
    return _onednn(cast(Pads, around), gradient, jnp.flip(kernel, (0, 1)).swapaxes(2, 3))


def _kept(function):
    return lambda pads, *operands: (function(pads, *operands), operands)


_onednn.defvjp(_kept(_onednn), lambda pads, kept, g: (_of_input(pads, g, kept[1]), _of_kernel(pads, kept[0], g)))
_of_kernel.defvjp(_kept(_of_kernel), lambda pads, kept, k: (_of_input(pads, kept[1], k), _onednn(pads, kept[0], k)))


def _call(pads: Sequence[tuple[int, int]], x: jax.Array, kernel: jax.Array) -> jax.Array:
    """XLA's operation, of [B, *sizes, C] and [*sizes, C, D]; it is told where it finds the axes
    (xla/service/cpu/onednn_config.proto)."""
    n = len(pads)
    image = {"dims": n + 2, "data": {"batch_dim": 0, "feature_dim": n + 1, "spatial_dims": list(range(1, n + 1))}}
    order = {"input_feature_dim": n, "output_feature_dim": n + 1, "spatial_dims": list(range(n))}
    sizes = kernel.shape[:n]
    window = {
        "size": list(sizes),
        "pad_left": [low for low, _ in pads],
        "pad_right": [high for _, high in pads],
        "strides": [1] * n,
        "window_dilations": [1] * n,
    }
    config = {"dims": n + 2, "input": image, "kernel": {"dims": n + 2, "filter": order}, "output": image,
              "window": window, "feature_groups": 1}  # fmt: skip
    out = (m + low + high - k + 1 for m, (low, high), k in zip(x.shape[1:-1], pads, sizes, strict=True))
    return jax.ffi.ffi_call(
        "__onednn$convolution",
        jax.ShapeDtypeStruct((x.shape[0], *out, kernel.shape[-1]), x.dtype),
        custom_call_api_version=2,
        legacy_backend_config=json.dumps({"onednn_conv_config": config}),
        vmap_method="sequential",
    )(x, kernel)
