"""Matrix products and convolutions by oneDNN, PyTorch's library too, on x86 CPUs: `pip install "jax_diffusion[cpu]"`.

A U-Net trains by it in two thirds of the time that XLA's own take (docs/benchmarks.md). jaxlib holds a copy, which XLA
cannot ask for a kernel's gradient, nor for programs that it could write down; so the library is called through jax.ffi.
"""

import contextlib

import jax

from jax_diffusion import lowering
from jax_diffusion.onednn.library import exists, why_not

__all__ = ["advice", "exists", "off", "taken", "why_not"]

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


def _wanted() -> bool:
    """For a single CPU: XLA could not cut the calls over several."""
    here = lowering.target() == jax.default_backend() == "cpu" and jax.device_count() == 1
    return here and not _off


def taken() -> bool:
    """Whether what is traced now is by oneDNN."""
    return _wanted() and not why_not()


def advice() -> str:
    """What would make it taken, in a line; "" where it is, or cannot be."""
    return why_not() if _wanted() and exists() else ""
