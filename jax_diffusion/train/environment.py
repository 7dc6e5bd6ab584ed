"""Where and with what a run was started: one line of WORKDIR/environment.jsonl a start.

A week later it answers which version, which chip and which flags made a number. What it holds is chosen here name by
name, because runs are shared: of the environment's variables no other than XLA's and JAX's are looked at.
"""

import importlib.metadata
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jax_diffusion.version import __version__

FILE = "environment.jsonl"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "libtpu", "jax-cuda13-plugin",
            "jax-cuda12-plugin", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12")  # fmt: skip
_VARIABLE = re.compile(r"XLA_FLAGS|LIBTPU_INIT_ARGS|JAX_\w+")
_SECRET = re.compile(r"(?i)(\w*(?:key|token|secret|password|passwd|credential)\w*)(=|\s+)\S+")
_LOGIN = re.compile(r"(\w+://)[^/\s@]+@")


def _hidden(text: str) -> str:
    """`text` without what looks like a secret: the value of --api_key=..., the user and password of an address."""
    return _LOGIN.sub(r"\1***@", _SECRET.sub(r"\1\2***", text))


def variables(environ: Mapping[str, str]) -> dict[str, str]:
    """XLA_FLAGS, LIBTPU_INIT_ARGS and JAX_* of an environment, secrets hidden."""
    kept = {k: v for k, v in sorted(environ.items()) if _VARIABLE.fullmatch(k)}
    return {k: "***" if _SECRET.fullmatch(f"{k}=x") else _hidden(v) for k, v in kept.items()}


def versions() -> dict[str, str]:
    """Of Python, of this package and of those of PACKAGES that are installed."""
    out = {"python": platform.python_version(), "jax_diffusion": __version__}
    for name in PACKAGES:
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return out


def git_commit(folder: pathlib.Path) -> dict[str, Any] | None:
    """{"commit", "changed": whether tracked files differ from it} of the working copy that holds `folder`, or None."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},  # it only looks
        )
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):  # no git, no working copy, or a file system too slow to ask
        return None


def _code() -> dict[str, Any] | None:
    """The commit of this package's checkout, else of the folder that the command is run in."""
    package = pathlib.Path(__file__).parents[2]
    if (package / ".git").exists():
        found, of = git_commit(package), "jax_diffusion"
    else:
        found, of = git_commit(pathlib.Path.cwd()), "the working folder"
    return None if found is None else {**found, "of": of}


def facts(mesh: jax.sharding.Mesh, step: int, command: Sequence[str] | None = None) -> dict[str, Any]:
    """What `record` writes, JSON's types alone.

    step: that the run starts from, 0 or that of the checkpoint.  command: of the process, None is sys.argv.
    """
    devices: dict[str, int] = {}
    for device in mesh.devices.flat:
        devices[device.device_kind] = devices.get(device.device_kind, 0) + 1
    return {
        "time": round(time.time(), 3),
        "step": step,
        "command": [_hidden(word) for word in (sys.argv if command is None else command)],
        "host": platform.node(),
        "system": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "platform": mesh.devices.flat[0].platform,
        "devices": devices,
        "processes": jax.process_count(),
        "mesh": {name: int(size) for name, size in mesh.shape.items()},
        "versions": versions(),
        "variables": variables(os.environ),
        "code": _code(),
    }


def record(workdir: str | pathlib.Path, mesh: jax.sharding.Mesh, step: int) -> None:
    """Appends this start to WORKDIR/environment.jsonl; on other processes than the first it does nothing."""
    if jax.process_index() == 0:
        with (pathlib.Path(workdir) / FILE).open("a") as f:
            f.write(json.dumps(facts(mesh, step)) + "\n")
