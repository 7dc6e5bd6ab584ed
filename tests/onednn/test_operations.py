"""oneDNN's products and convolutions beside NumPy's, torch's and XLA's, with all their derivatives."""

import concurrent.futures
import functools
import itertools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jax_diffusion import onednn
from jax_diffusion.onednn import operations
from jax_diffusion.train import flops

pytestmark = pytest.mark.skipif(bool(onednn.why_not()), reason=onednn.why_not())

BY_XLA = {operations.PRODUCT: operations._product_by_xla, operations.CONVOLUTION: operations._convolution_by_xla}


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch):
    monkeypatch.setattr(operations, "LEAST", dict.fromkeys(operations.LEAST, 0))
    monkeypatch.setattr(operations, "BLOCK", 1)


def draw(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), jnp.float32)


def close(ours, theirs, tolerance=2e-6):
    """Where sums of a few hundred products have their own order."""
    ours, theirs = jax.tree.leaves(ours), jax.tree.leaves(theirs)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * float(np.abs(b).max()))


# What is compared: an operation on operands, whose gradients are operations of the other kinds.
def a_product(transpose_a=False, transpose_b=False, heads=(), inside=(False,) * 3):
    """Of 5 rows and 4 columns along 7."""

    def put(rows, columns, within):
        return draw(heads[0], rows, heads[1], columns) if within else draw(*heads, rows, columns)

    a = put(*((7, 5) if transpose_a else (5, 7)), inside[0])
    b = put(*((4, 7) if transpose_b else (7, 4)), inside[1])
    how = {"transpose_a": transpose_a, "transpose_b": transpose_b, "inside": inside}
    return functools.partial(operations.PRODUCT.bind, **how), a, b


PRODUCTS = [
    *(a_product(*transposes) for transposes in itertools.product((False, True), repeat=2)),
    a_product(heads=(2, 3)),
    a_product(heads=(2, 3), transpose_b=True, inside=(True, True, False)),  # attention's two
    a_product(heads=(2, 3), inside=(False, True, True)),
    a_product(heads=(2, 3), transpose_a=True, transpose_b=True, inside=(True, False, True)),
]
PADS = ((1, 0), (0, 1))
IMAGE, KERNEL, RESULT = draw(3, 6, 5, 4), draw(2, 3, 4, 9), draw(3, 6, 4, 9)
CONVOLUTIONS = [
    (functools.partial(operations.CONVOLUTION.bind, of=of, pads=PADS), *operands)
    for of, operands in {"result": (IMAGE, KERNEL), "input": (RESULT, KERNEL), "kernel": (IMAGE, RESULT)}.items()
]
CASES = PRODUCTS + CONVOLUTIONS
each = pytest.mark.parametrize("ours, a, b", CASES, ids=[str(one.keywords) for one, *_ in CASES])


def by_xla(ours):
    return functools.partial(BY_XLA[ours.func.__self__], **ours.keywords)


@each
def test_values_and_derivatives_in_both_modes_are_xlas(ours, a, b):
    theirs = by_xla(ours)

    def derived(f):
        cubed = lambda a, b: jnp.sum(f(a, b) ** 3)  # noqa: E731
        first = jax.grad(cubed, (0, 1))
        second = jax.grad(lambda a, b: sum(jnp.sum(g**2) for g in first(a, b)), (0, 1))
        forward = lambda a, b: jax.jvp(f, (a, b), (b.sum() * a, a.sum() * b))  # noqa: E731
        return [jax.jit(one)(a, b) for one in (f, first, second, forward)]

    assert "jax_diffusion_onednn" in jax.jit(ours).lower(a, b).compile().as_text()
    close(derived(ours), derived(theirs), tolerance=1e-5)  # four products one after another
    close(ours(a, b), theirs(a, b))  # and not compiled


@each
@pytest.mark.parametrize("axes", [(0, None), (None, 1), (1, 2)], ids=str)
def test_mapped_over_either_operand_or_both(ours, a, b, axes):
    put = lambda x, axis: x if axis is None else jnp.stack([x, 2 * x, x - 1], axis)  # noqa: E731
    a, b = put(a, axes[0]), put(b, axes[1])
    close(jax.vmap(ours, axes)(a, b), jax.vmap(by_xla(ours), axes)(a, b))
    # Gradients of each example, those of kernels among them.
    loss = lambda f: lambda a, b: jnp.sum(f(a, b) ** 2)  # noqa: E731
    mapped = [jax.jit(jax.vmap(jax.grad(loss(f), (0, 1)), axes)) for f in (ours, by_xla(ours))]
    close(*(f(a, b) for f in mapped), tolerance=5e-6)


@pytest.mark.parametrize(
    "shape, kernel, padding",
    [
        ((2, 8, 8, 16), (3, 3, 16, 32), ((1, 1), (1, 1))),
        ((3, 5, 7, 3), (3, 3, 3, 9), ((1, 1), (1, 1))),  # channels and sizes of no vector's length
        ((1, 6, 6, 8), (2, 2, 8, 8), ((1, 0), (0, 1))),  # of an upsampled image, by parity
        ((2, 9, 9, 4), (5, 3, 4, 1), ((2, 2), (0, 0))),
        ((17, 4, 5, 6), (1, 1, 6, 8), ((0, 0), (0, 0))),
    ],
)
def test_convolutions_and_both_gradients_are_torchs(shape, kernel, padding):
    x, k = draw(*shape), draw(*kernel)
    y, back = jax.vjp(jax.jit(functools.partial(operations.convolution, pads=padding)), x, k)
    gradient = draw(*y.shape)
    their_x = torch.tensor(np.asarray(x).transpose(0, 3, 1, 2), requires_grad=True)
    their_k = torch.tensor(np.asarray(k).transpose(3, 2, 0, 1), requires_grad=True)
    (top, bottom), (left, right) = padding
    theirs = torch.nn.functional.conv2d(torch.nn.functional.pad(their_x, (left, right, top, bottom)), their_k)
    theirs.backward(torch.tensor(np.asarray(gradient).transpose(0, 3, 1, 2)))
    expected = theirs.detach().permute(0, 2, 3, 1), their_x.grad.permute(0, 2, 3, 1), their_k.grad.permute(2, 3, 1, 0)
    close([y, *back(gradient)], [np.asarray(v) for v in expected], tolerance=1e-5)


@each
def test_elsewhere_they_are_xlas(ours, a, b):
    lowered = jax.jit(ours).trace(a, b).lower(lowering_platforms=("tpu",)).as_text()
    assert "onednn" not in lowered and ("stablehlo.convolution" in lowered or "stablehlo.dot_general" in lowered)


@each
def test_flops_are_counted(ours, a, b):
    """Of a product as XLA's; of a convolution and both its gradients as of XLA's convolution."""
    one = flops.count(jax.make_jaxpr(ours)(a, b))
    theirs, operands = by_xla(ours), (a, b)
    if "of" in ours.keywords:
        theirs, operands = functools.partial(BY_XLA[operations.CONVOLUTION], of="result", pads=PADS), (IMAGE, KERNEL)
    assert one == flops.count(jax.make_jaxpr(theirs)(*operands)) > 0


def test_several_threads_run_one_operation_at_once():
    x, k = draw(8, 16, 16, 8), draw(3, 3, 8, 8)
    run = jax.jit(jax.grad(lambda k, x: jnp.sum(operations.convolution(x, k, ((1, 1), (1, 1))) ** 2)))
    inputs = [i * x for i in range(1, 17)]
    alone = [run(k, v) for v in inputs]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        close(list(pool.map(functools.partial(run, k), inputs)), alone, tolerance=1e-5)  # shares of other sizes


@pytest.mark.parametrize("threads", [1, 6])
def test_any_number_of_threads(threads):
    """XLA reads it where it starts. Of 6, results are cut into rows and columns, images into bands of rows."""
    tests = [__file__, "-k", "torchs or mapped"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        env=os.environ | {"NPROC": str(threads)}, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]


def test_results_do_not_depend_on_which_thread_was_first():
    x, k = draw(5, 16, 16, 8), draw(3, 3, 8, 16)
    gradients = jax.jit(jax.grad(lambda k, x: jnp.sum(operations.convolution(x, k, ((1, 1), (1, 1))) ** 2), (0, 1)))
    first = gradients(k, x)
    for _ in range(50):
        jax.tree.map(np.testing.assert_array_equal, gradients(k, x), first)


def test_what_it_cannot_do_is_an_error_and_no_crash():
    with pytest.raises(jax.errors.JaxRuntimeError, match="oneDNN"):
        operations.convolution(draw(1, 4, 4, 2), draw(3, 3, 2, 2), ((-9, 9), (0, 0))).block_until_ready()
