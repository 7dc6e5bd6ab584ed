"""jax_diffusion: diffusion models in JAX, the training step and the reverse process one program each.

    schedule -> process -> denoiser -> guidance -> solver -> sample

Names are resolved on first use, so that importing the package is quick and starts no accelerator.
"""

import importlib

from jax_diffusion.version import __version__

_MODULES = (
    "bound", "caching", "cli", "conditions", "config", "data", "editing", "errors", "evals", "guidance", "interop",
    "io", "likelihood", "models", "parameterization", "placement", "posterior", "process", "schedules", "sharding",
    "solvers", "timesteps", "train", "weighting",
)  # fmt: skip
_NAMES = {
    "Model": "jax_diffusion.model",
    "UserError": "jax_diffusion.errors",
    "load": "jax_diffusion.loading",
    "sample": "jax_diffusion.solvers.sampling",
    "save_diffusers": "jax_diffusion.interop.export",
}

__all__ = ["__version__", *_MODULES, *_NAMES]


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f"jax_diffusion.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'jax_diffusion' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
