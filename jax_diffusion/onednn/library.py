"""The library: found among the installed packages, its calls (*.cc) compiled for this machine and known to XLA.

It comes with `pip install "jax_diffusion[cpu]"`. The compiler is the user's, $CXX, c++, g++ or clang++; what it makes
is kept beside the compiled programs in the user's cache folder.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import jax
import numpy as np

from jax_diffusion import runtime

SOURCES = [pathlib.Path(__file__).with_name(name) for name in ("blocks.h", "convolution.cc", "product.cc")]
WHEELS = "onednn-cpu-gomp", "onednn-devel-cpu-gomp"  # the library, and its headers
LIBRARY, HEADER = "libdnnl.so.3", "oneapi/dnnl/dnnl.hpp"
CALLS = "product", "pack", "result", "input", "kernel"
Attribute = bool | int | Sequence[int]


class Missing(RuntimeError):
    """Why it cannot be had here, in one line."""


def call(name: str, *operands: jax.Array, shape: tuple[int, ...], **attributes: Attribute) -> jax.Array:
    """One of CALLS, of float32; its attributes are in *.cc, where integers are of 64 bits. Raises Missing."""
    load()
    put = {name: v if isinstance(v, bool) else np.asarray(v, np.int64)[()] for name, v in attributes.items()}
    return jax.ffi.ffi_call(_target(name), jax.ShapeDtypeStruct(shape, np.float32))(*operands, **put)


@functools.cache
def why_not() -> str:
    """Why `load` raises; "" where it does not."""
    try:
        load()
    except Missing as error:
        return str(error)
    return ""


def exists() -> bool:
    """Whether there is a library for this kind of machine."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


@functools.cache
def load() -> None:
    """Makes the functions known to XLA, compiling them where that was not done yet. Raises Missing."""
    if not exists():
        raise Missing(f"there is none for {sys.platform} on {platform.machine()}")
    library, header = (_file(wheel, name) for wheel, name in zip(WHEELS, (LIBRARY, HEADER), strict=True))
    _open(library)
    try:
        functions = _open(_compiled(library, header.parents[2]))
    except OSError as error:  # a full disk
        raise Missing(str(error)) from error
    for name in CALLS:
        function = jax.ffi.pycapsule(getattr(functions, f"onednn_{name}"))
        jax.ffi.register_ffi_target(_target(name), function, platform="cpu")


def _target(name: str) -> str:
    """A program that was kept calls by this name what it was compiled for, or nothing."""
    return f"jax_diffusion_onednn_{name}_{_digest(*_sources())}"


@functools.cache  # each call that is traced names them
def _sources() -> list[bytes]:
    return [path.read_bytes() for path in SOURCES]


def _file(wheel: str, name: str) -> pathlib.Path:
    try:
        found = next(f for f in importlib.metadata.files(wheel) or () if f.as_posix().endswith(f"/{name}"))
    except (importlib.metadata.PackageNotFoundError, StopIteration) as error:
        raise Missing(f'{wheel} is not installed: pip install "jax_diffusion[cpu]"') from error
    return pathlib.Path(os.path.normpath(found.locate()))


def _open(path: pathlib.Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise Missing(str(error)) from error


def _compiled(library: pathlib.Path, headers: pathlib.Path) -> pathlib.Path:
    compiler = next(filter(None, map(shutil.which, [os.environ.get("CXX", ""), "c++", "g++", "clang++"])), None)
    if compiler is None:
        raise Missing("there is no C++ compiler: install g++ or clang++, or set CXX")
    made_of = [
        *_sources(),
        *(f"{name} {importlib.metadata.version(name)}".encode() for name in ("jaxlib", *WHEELS)),
    ]
    path = _folder() / f"onednn-{_digest(*made_of)}.so"
    if not path.exists():
        print("compiling the calls of oneDNN, once: about 5 s", file=sys.stderr, flush=True)
        # Several processes may do it at once: each renames a file of its own.
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            draft, sources = pathlib.Path(folder) / path.name, [str(p) for p in SOURCES if p.suffix == ".cc"]
            command = [compiler, "-std=c++17", "-O1", "-fPIC", "-shared", "-w", f"-I{headers}",
                       f"-I{jax.ffi.include_dir()}", *sources, "-o", str(draft), str(library)]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
                raise Missing(f"{shlex.quote(compiler)} fails: {first}")
            draft.replace(path)
    return path


def _folder() -> pathlib.Path:
    """The user's, or one of this process where that cannot be written."""
    with contextlib.suppress(RuntimeError):  # no home directory
        folder = runtime.default_folder()
        if not runtime.writable(str(folder)):
            return folder
    return pathlib.Path(tempfile.mkdtemp(prefix="jax_diffusion_"))


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]
