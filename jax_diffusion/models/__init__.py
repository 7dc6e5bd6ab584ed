"""Networks. Nothing outside this package imports Flax; outside it a network is (init, apply)."""

from typing import Any

from jax_diffusion.errors import check_options, choose
from jax_diffusion.models.mlp import mlp
from jax_diffusion.models.network import Network
from jax_diffusion.models.unet import unet

__all__ = ["MODELS", "Network", "make", "mlp", "unet"]

MODELS = {"unet": unet, "mlp": mlp}


def make(name: str, shape: tuple[int, ...], **options: Any) -> Network:
    """The network `name` for samples of `shape`: `make("unet", (32, 32, 3), channels=64)`."""
    build = MODELS[choose("model.name", name, MODELS)]
    check_options(f"model {name!r}", build, options, positional=1)
    return build(tuple(shape), **options)
