"""Matrix products and convolutions by oneDNN, PyTorch's library too, on x86 CPUs: `pip install "jax_diffusion[cpu]"`.

In training it is up to twice as fast as XLA's own (docs/benchmarks.md). jaxlib holds a copy, which XLA cannot ask for a
kernel's gradient, nor for programs that it could write down; so the library is called through jax.ffi.
"""

import contextlib

import jax
import jax.numpy as jnp

from jax_diffusion import lowering
from jax_diffusion.onednn.library import why_not

__all__ = ["multiplies", "off", "taken", "why_not"]

# FLOPs below which a call costs more than it saves, of convolutions and of products.
LEAST_CONVOLUTION, LEAST_PRODUCT = 1.3e8, 2e7

_off = False  # of the process, its threads included


@contextlib.contextmanager
def off(yes: bool = True):
    """What is traced within has XLA's own. yes=False: has oneDNN's again."""
    global _off
    before, _off = _off, yes
    try:
        yield
    finally:
        _off = before


def taken() -> bool:
    """Whether what is traced now is by oneDNN: for a single CPU, since XLA could not cut its calls over several."""
    if _off or lowering.target() != "cpu" or jax.default_backend() != "cpu" or jax.device_count() != 1:
        return False
    return not why_not()


def multiplies(a: jax.Array, b: jax.Array, flops: int) -> bool:
    """Whether the product of these is for operations.product."""
    return a.dtype == b.dtype == jnp.float32 and flops >= LEAST_PRODUCT and taken()
