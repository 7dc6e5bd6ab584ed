"""How a command runs: where compiled programs are kept between two starts, and what was compiled.

Importing this package changes nothing in JAX; the commands call `keep_compiled`.
"""

import functools
import hashlib
import os
import pathlib
import platform
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

OFF = "off"
# Programs that compile faster than this are not kept: reading a file takes as long.
LEAST_SECONDS = 0.3


def machine() -> str:
    """This machine's kind: its architecture and a digest of its processor's features.

    XLA compiles for the very processor it runs on and JAX's key does not name it: in a home directory that machines
    share, one would load instructions that it does not have.
    """
    features = platform.processor()
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), features)
    except OSError:
        pass
    words = " ".join(sorted(features.partition(":")[2].split() or [features]))
    return f"{platform.machine()}-{hashlib.sha256(words.encode()).hexdigest()[:8]}"


def default_folder() -> pathlib.Path:
    """Where compiled programs are kept unless the user says otherwise: in the user's cache folder, by machine()."""
    said = os.environ.get("XDG_CACHE_HOME")
    root = pathlib.Path(said) if said and os.path.isabs(said) else pathlib.Path.home() / ".cache"
    return root / "jax_diffusion" / "compiled" / machine()


def writable(folder: str) -> str:
    """Makes `folder`; returns why nothing can be written there, "" where it can. Buckets ("gs://...") are not tried."""
    if "://" in folder:
        return ""
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)  # what lies there is run
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as e:
        return e.strerror or str(e)


def add_arguments(parser) -> None:
    """--compile_cache and --onednn, which every command takes."""
    parser.add_argument(
        "--compile_cache",
        metavar="DIR|off",
        help="where compiled programs are kept, so that a second start need not compile (default: "
        "$JAX_COMPILATION_CACHE_DIR, else jax_diffusion/compiled in the user's cache folder)",
    )
    parser.add_argument(
        "--onednn",
        choices=("auto", "on", "off"),
        default="auto",
        help="on x86 CPUs: matrix products and convolutions by oneDNN where it is installed (pip install "
        "'jax_diffusion[cpu]'; auto, the default), not without it (on), or by XLA (off)",
    )


def keep_compiled(said: str | None = None, warn: Callable[[str], None] | None = None) -> str:
    """Makes JAX keep compiled programs; returns the folder, "" where none is kept.

    said: --compile_cache: a folder, "off", or None: JAX_COMPILATION_CACHE_DIR, else default_folder(). A folder that
    cannot be written is one line to `warn` (default: stderr), and the command goes on without.
    """
    import jax

    if said is None and not jax.config.jax_enable_compilation_cache:  # JAX_ENABLE_COMPILATION_CACHE=0
        said = OFF
    folder = "" if said == OFF else said or jax.config.jax_compilation_cache_dir or str(_default())
    why = writable(os.path.expanduser(folder)) if folder else ""
    if why:
        warn = warn or (lambda line: print(line, file=sys.stderr))
        warn(f"warning: compiled programs are not kept: {folder}: {why}; choose --compile_cache=DIR or off")
        folder = ""
    folder = os.path.expanduser(folder)
    if (jax.config.jax_compilation_cache_dir or "") != folder:
        _restart_cache()
        jax.config.update("jax_compilation_cache_dir", folder or None)
    # What the user has set stays.
    for name, default, value in (
        ("jax_persistent_cache_min_compile_time_secs", 1.0, LEAST_SECONDS),
        ("jax_persistent_cache_min_entry_size_bytes", 0, -1),
    ):
        if getattr(jax.config, name) == default and name.upper() not in os.environ:
            jax.config.update(name, value)
    return folder


def _default() -> pathlib.Path | str:
    try:
        return default_folder()
    except RuntimeError:  # no home directory
        return ""


def _restart_cache() -> None:
    """Lets a changed folder count although something was compiled already (in notebooks and tests)."""
    from jax.experimental.compilation_cache import compilation_cache

    compilation_cache.reset_cache()


class Compiled(NamedTuple):
    """Counts of programs: XLA was asked for, of these read from the folder, and written there."""

    programs: int
    read: int
    written: int

    def __sub__(self, other: "Compiled") -> "Compiled":
        return Compiled(*(a - b for a, b in zip(self, other, strict=True)))


_seen = {"programs": 0, "read": 0, "written": 0}


@functools.cache
def _listen() -> None:
    import jax

    def on_duration(event: str, duration_secs: float, **kwargs: Any) -> None:
        _seen["programs"] += event == "/jax/core/compile/backend_compile_duration"

    def on_event(event: str, **__) -> None:
        _seen["read"] += event == "/jax/compilation_cache/cache_hits"
        _seen["written"] += event == "/jax/compilation_cache/cache_misses"

    jax.monitoring.register_event_duration_secs_listener(on_duration)
    jax.monitoring.register_event_listener(on_event)


def compiled() -> Compiled:
    """Counts from its first call on; the difference of two is what was compiled between them."""
    _listen()
    return Compiled(**_seen)
