"""The operations as JAX sees them: primitives, linear in each of two operands, whose derivatives are they themselves.

So there are derivatives of any order, in forward and reverse mode. On other platforms they are XLA's.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir

from jax_diffusion import onednn
from jax_diffusion.onednn import library

Pads = tuple[tuple[int, int], tuple[int, int]]
Inside = tuple[bool, bool, bool]
NHWC = ("NHWC", "HWIO", "NHWC")


def product(
    a: jax.Array, b: jax.Array, transpose_a: bool = False, transpose_b: bool = False, inside: Inside = (False,) * 3
) -> jax.Array:
    """a b, each transposed first if it is said: [..., M, K] by [..., K, N] of the same first axes. float32.

    inside: of a, b and what is made: whether the last of the first axes lies within the rows, [..., M, heads, K].
    """
    return PRODUCT.bind(a, b, transpose_a=transpose_a, transpose_b=transpose_b, inside=inside)


def convolution(x: jax.Array, kernel: jax.Array, pads: Pads) -> jax.Array:
    """[B, H, W, C] by [h, w, C, D], stride 1; no pad as large as the kernel. float32."""
    return CONVOLUTION.bind(x, kernel, of="result", pads=pads)


# FLOPs from which on a call costs less than it saves (docs/benchmarks.md): of a product, and of each of a convolution's
# three.
LEAST_PRODUCT = 2e7
LEAST = {"result": 1e6, "input": 1e6, "kernel": 4e6}
BLOCK = 6_000_000  # FLOPs from which on a part of an operation is worth a thread of its own


def multiplies(a: jax.Array, b: jax.Array, flops: int) -> bool:
    """Whether the product of these is for `product`."""
    return a.dtype == b.dtype == jnp.float32 and flops >= LEAST_PRODUCT and onednn.taken()


def saveable(primitive: Any, *avals: Any, **params: Any) -> bool:
    """What jax.checkpoint_policies.dots_with_no_batch_dims_saveable is for lax.dot_general."""
    return primitive is PRODUCT and len(avals[0].shape) == 2


def _primitive(name: str, statics: tuple[str, ...], shape: Callable, mapped: Callable, xla: Callable, own: Callable):
    """Made by own(a, b, **statics) on CPUs, by xla(a, b, **statics) elsewhere."""
    primitive = jax.extend.core.Primitive(name)
    primitive.def_impl(jax.jit(primitive.bind, static_argnames=statics))
    primitive.def_abstract_eval(lambda a, b, **static: jax.core.ShapedArray(shape(a.shape, b.shape, **static), a.dtype))
    batching.primitive_batchers[primitive] = mapped
    mlir.register_lowering(primitive, mlir.lower_fun(xla, multiple_results=False))
    mlir.register_lowering(primitive, mlir.lower_fun(own, multiple_results=False), platform="cpu")
    return primitive


# Products.


def _outside(shape: tuple[int, ...], inside: bool) -> tuple[int, ...]:
    """[..., R, heads, C] as [..., heads, R, C], and back."""
    return (*shape[:-3], shape[-2], shape[-3], shape[-1]) if inside else shape


def _product_shape(a, b, *, transpose_a: bool, transpose_b: bool, inside: Inside) -> tuple[int, ...]:
    a, b = (_outside(shape, within) for shape, within in zip((a, b), inside[:2], strict=True))
    return _outside((*a[:-2], a[-1 if transpose_a else -2], b[-2 if transpose_b else -1]), inside[2])


def _product_by_onednn(a, b, **how):
    shape = _product_shape(a.shape, b.shape, **how)
    four = lambda shape: (math.prod(shape[:-3]), *(1,) * (3 - len(shape)), *shape[-3:])  # noqa: E731
    a, b = (x.reshape(four(x.shape)) for x in (a, b))
    transposes = {name: how[name] for name in ("transpose_a", "transpose_b")}
    inside = dict(zip(("inside_a", "inside_b", "inside_made"), how["inside"], strict=True))
    return library.call("product", a, b, shape=four(shape), block=BLOCK, **transposes, **inside).reshape(shape)


def _product_by_xla(a, b, *, transpose_a: bool, transpose_b: bool, inside: Inside):
    outside = lambda x, within: x.swapaxes(-3, -2) if within else x  # noqa: E731
    a, b, n = outside(a, inside[0]), outside(b, inside[1]), a.ndim
    along = ((n - 2 if transpose_a else n - 1,), (n - 1 if transpose_b else n - 2,))
    return outside(jax.lax.dot_general(a, b, (along, (tuple(range(n - 2)),) * 2)), inside[2])


def _mapped_product(operands, axes, **how):
    """A mapped axis is one more of the first, or joins the rows where the other operand is one matrix."""
    (a, b), size = operands, next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
    if axes[1] is None and b.ndim == 2 and not how["transpose_a"]:
        a = jnp.moveaxis(a, axes[0], 0)
        return PRODUCT.bind(a.reshape(-1, a.shape[-1]), b, **how).reshape(*a.shape[:2], -1), 0
    a, b = (
        jnp.broadcast_to(x[None], (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(operands, axes, strict=True)
    )
    return PRODUCT.bind(a, b, **how), 0


PRODUCT = _primitive(
    "onednn_product",
    statics=("transpose_a", "transpose_b", "inside"),
    shape=_product_shape,
    mapped=_mapped_product,
    xla=_product_by_xla,
    own=_product_by_onednn,
)


def _of_a(made, a, b, *, transpose_a: bool, transpose_b: bool, inside: Inside):
    of_a, of_b, of_made = inside
    if transpose_a:
        return product(b, made, transpose_b, True, (of_b, of_made, of_a))
    return product(made, b, False, not transpose_b, (of_made, of_b, of_a))


def _of_b(made, a, b, *, transpose_a: bool, transpose_b: bool, inside: Inside):
    of_a, of_b, of_made = inside
    if transpose_b:
        return product(made, a, True, transpose_a, (of_made, of_a, of_b))
    return product(a, made, not transpose_a, False, (of_a, of_made, of_b))


ad.defbilinear(PRODUCT, _of_a, _of_b)


# Convolutions: sum_{o, i, j} y_o x_i k_j of result, input and kernel; the derivative by one is made of the other two.

_MADE_OF = {"result": ("input", "kernel"), "input": ("result", "kernel"), "kernel": ("input", "result")}
_plain = functools.partial(jax.lax.conv_general_dilated, window_strides=(1, 1), dimension_numbers=NHWC)


def _convolution_shape(a, b, *, of: str, pads: Pads) -> tuple[int, ...]:
    around = [low + high for low, high in pads]
    if of == "result":
        return (a[0], *(m + p - k + 1 for m, p, k in zip(a[1:3], around, b[:2], strict=True)), b[3])
    if of == "input":
        return (a[0], *(n - p + k - 1 for n, p, k in zip(a[1:3], around, b[:2], strict=True)), b[2])
    return (*(m + p - n + 1 for m, p, n in zip(a[1:3], around, b[1:3], strict=True)), a[3], b[3])


def _convolution_by_onednn(a, b, *, of: str, pads: Pads):
    shape = _convolution_shape(a.shape, b.shape, of=of, pads=pads)
    if _convolution_flops(a, b, jax.ShapeDtypeStruct(shape, a.dtype), of=of, pads=pads) < LEAST[of]:
        return _convolution_by_xla(a, b, of=of, pads=pads)
    around = [pad for both in pads for pad in both]
    if of != "kernel":  # a call of its own, which XLA takes out of a sampler's loop
        image = a.shape if of == "result" else shape
        b = library.call("pack", b, shape=b.shape, of=int(of == "input"), image=image, pads=around)
    return library.call(of, a, b, shape=shape, block=BLOCK, pads=around)


def _convolution_by_xla(a, b, *, of: str, pads: Pads):
    if of == "result":
        return _plain(a, b, padding=pads)
    made = jax.ShapeDtypeStruct(_convolution_shape(a.shape, b.shape, of=of, pads=pads), a.dtype)
    if of == "input":
        return jax.linear_transpose(lambda x: _plain(x, b, padding=pads), made)(a)[0]
    return jax.linear_transpose(lambda kernel: _plain(a, kernel, padding=pads), made)(b)[0]


def _mapped_convolution(operands, axes, **static):
    """A mapped axis joins the batch; where it is the kernel that is mapped, or made, one is taken after the other."""
    a, b = (x if axis is None else jnp.moveaxis(x, axis, 0) for x, axis in zip(operands, axes, strict=True))
    if static["of"] != "kernel" and axes[1] is None:
        made = CONVOLUTION.bind(a.reshape(-1, *a.shape[2:]), b, **static)
        return made.reshape(*a.shape[:2], *made.shape[1:]), 0
    size = (b if axes[0] is None else a).shape[0]
    nth = lambda x, axis, i: x if axis is None else x[i]  # noqa: E731
    one = lambda i: CONVOLUTION.bind(nth(a, axes[0], i), nth(b, axes[1], i), **static)  # noqa: E731
    return jax.lax.map(one, jnp.arange(size)), 0


CONVOLUTION = _primitive(
    "onednn_convolution",
    statics=("of", "pads"),
    shape=_convolution_shape,
    mapped=_mapped_convolution,
    xla=_convolution_by_xla,
    own=_convolution_by_onednn,
)


def _of_operand(position: int):
    def gradient(made, a, b, *, of: str, pads: Pads):
        wanted, other = _MADE_OF[of][position], _MADE_OF[of][1 - position]
        arrays = {of: made, other: (a, b)[1 - position]}
        return CONVOLUTION.bind(*(arrays[name] for name in _MADE_OF[wanted]), of=wanted, pads=pads)

    return gradient


ad.defbilinear(CONVOLUTION, _of_operand(0), _of_operand(1))


def _product_flops(a, b, made, *, transpose_a: bool, transpose_b: bool, inside: Inside) -> float:
    return 2.0 * made.size * _outside(a.shape, inside[0])[-2 if transpose_a else -1]


def _convolution_flops(a, b, made, *, of: str, pads: Pads) -> float:
    arrays = {of: made, **dict(zip(_MADE_OF[of], (a, b), strict=True))}
    return 2.0 * arrays["result"].size * arrays["kernel"].size / arrays["kernel"].shape[-1]


# Of a primitive's name: FLOPs from the two operands' and the result's shapes, and its parameters.
FLOPS: dict[str, Callable[..., float]] = {PRODUCT.name: _product_flops, CONVOLUTION.name: _convolution_flops}
