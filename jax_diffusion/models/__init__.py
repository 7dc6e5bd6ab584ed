"""Networks. Nothing outside this package imports Flax; outside it a network is (init, apply)."""

from collections.abc import Callable
from typing import Any

from jax_diffusion.errors import check_options, choose
from jax_diffusion.models.dit import dit
from jax_diffusion.models.edm2 import edm2
from jax_diffusion.models.linear_attention_unet import linear_attention_unet
from jax_diffusion.models.mlp import mlp
from jax_diffusion.models.network import Network, defaults
from jax_diffusion.models.song_unet import song_unet
from jax_diffusion.models.uncertainty import with_uncertainty
from jax_diffusion.models.unet import unet
from jax_diffusion.models.uvit import uvit

__all__ = [
    "MODELS",
    "Network",
    "dit",
    "edm2",
    "linear_attention_unet",
    "make",
    "mlp",
    "options",
    "song_unet",
    "unet",
    "uvit",
    "with_uncertainty",
]

MODELS: dict[str, Callable[..., Network]] = {
    "unet": unet,
    "dit": dit,
    "uvit": uvit,
    "mlp": mlp,
    "edm2": edm2,
    "linear_attention_unet": linear_attention_unet,
    "song_unet": song_unet,
}


_OF_THE_DATA = ("num_classes", "learn_variance", "constrain")  # said elsewhere in a config, or not at all


def options(name: str) -> dict[str, Any]:
    """The options of network `name` and their defaults: the fields of a config's model group."""
    known = defaults(MODELS[choose("model.name", name, MODELS)])
    return {**{k: v for k, v in known.items() if k not in _OF_THE_DATA}, "uncertainty": 0}


def make(name: str, shape: tuple[int, ...], *, uncertainty: int = 0, **options: Any) -> Network:
    """The network `name` for samples of `shape`: `make("unet", (32, 32, 3), channels=64)`.

    uncertainty: Fourier features of a learned log-variance of the loss (uncertainty.py); 0 is none.
    """
    build = MODELS[choose("model.name", name, MODELS)]
    check_options(f"model {name!r}", build, options, positional=1, also="uncertainty")
    network = build(tuple(shape), **options)
    return with_uncertainty(network, uncertainty) if uncertainty else network
