"""How XLA is asked to compile on each platform; every entry was measured (docs/benchmarks.md)."""

import contextlib
import contextvars
import ctypes
import functools
import glob
import os
import pathlib
import resource
from collections.abc import Callable
from typing import Any

import jax

# Left to itself, XLA hands convolutions on CPUs to YNNPACK, which runs those of large images on one core and the
# gradients of all at half of Eigen's rate: they stay with Eigen.
_YNNPACK: dict[str, Any] = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"
}


def compiler_options(platform: str) -> dict[str, Any] | None:
    """What this build of XLA is asked for, for jax.jit; None where there is nothing."""
    return _YNNPACK if platform == "cpu" and _knows(tuple(_YNNPACK.items())) else None


@functools.cache
def _knows(options: tuple[tuple[str, Any], ...]) -> bool:
    one = jax.ShapeDtypeStruct((), "float32")
    try:
        jax.jit(lambda a: a + 1, compiler_options=dict(options)).lower(one).compile()
    except Exception:  # an option of another version: XLA names it in errors of several types
        return False
    return True


def jit(function: Callable, platform: str | None = None, **options: Any) -> Callable:
    """jax.jit with the compiler options of a platform; None is the default backend's."""
    return jax.jit(function, compiler_options=compiler_options(platform or jax.default_backend()), **options)


_target: contextvars.ContextVar[str | None] = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def _holding(variable: contextvars.ContextVar, value: Any):
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def compiling_for(platform: str) -> contextlib.AbstractContextManager[None]:
    """What is traced within is meant for `platform`, wherever this process runs: see `target`."""
    return _holding(_target, platform)


def target() -> str:
    """The platform that is traced for: "cpu", "gpu", "cuda", "tpu". For choices that lax.platform_dependent, which
    chooses a lowering, cannot make: what is kept for the gradient."""
    return _target.get() or jax.default_backend()


_forward_mode: contextvars.ContextVar[bool] = contextvars.ContextVar("forward_mode", default=False)


def differentiable_forward() -> contextlib.AbstractContextManager[None]:
    """Within it networks are traced to what forward-mode differentiation takes: cuDNN's attention has a reverse mode
    only."""
    return _holding(_forward_mode, True)


def forward_mode() -> bool:
    return _forward_mode.get()


def recomputed(function: Callable) -> Callable:
    """`function`, computed again in the backward pass instead of stored.

    On accelerators XLA may undo it: where it does, storing takes less time (docs/benchmarks.md). On CPUs it undoes all
    of it where it can, and the step takes longer and holds more.
    """
    return jax.checkpoint(function, prevent_cse=target() == "cpu")


# glibc's <malloc.h>
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_MADV_HUGEPAGE = 14  # Linux's <sys/mman.h>
_ACCELERATORS = ("/dev/nvidiactl", "/dev/kfd", "/dev/accel*", "/dev/vfio/[0-9]*")  # NVIDIA's, AMD's, TPUs


def _platform_to_come() -> str:
    """The default backend's platform, guessed where there is no backend yet."""
    said = (jax.config.jax_platforms or "").split(",")[0]
    return said or ("cpu" if not any(glob.glob(path) for path in _ACCELERATORS) else "accelerator")


def keep_memory(platform: str | None = None) -> bool:
    """Lets a process that computes on CPUs keep the memory that it frees; False where it does not or cannot.

    On CPUs XLA allocates a program's intermediate results, hundreds of megabytes, anew for each call. glibc takes such
    blocks from the system and gives them back, and every page is zeroed again: up to half of a training step.

    Call it before JAX's backend starts its threads: those that run already have a heap of their own, which cannot hold
    large blocks, and go on asking the system for them. platform: None guesses the one to come.
    """
    if (platform or _platform_to_come()) != "cpu":
        return False
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 64 << 20))
        if 0 not in [libc.mallopt(*setting) for setting in settings]:
            _ask_for_huge_pages(libc)
            return True
    return False


def _ask_for_huge_pages(libc: ctypes.CDLL):
    """Has the heap that is to come backed by pages of 2 MiB where the system offers them: less to look up, and what is
    touched for the first time costs a 500th of the faults. The heap is grown by half of the machine's memory, of which
    nothing is touched, and given back to malloc; not where addresses are counted."""
    with contextlib.suppress(OSError):
        if pathlib.Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2":
            return
    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        return
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    libc.free.restype, libc.free.argtypes = None, (ctypes.c_void_p,)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    page = os.sysconf("SC_PAGE_SIZE")
    size = os.sysconf("SC_PHYS_PAGES") * page // 2
    block = libc.malloc(size)
    if block:
        libc.madvise(-(-block // page) * page, size - page, _MADV_HUGEPAGE)
        libc.free(block)
