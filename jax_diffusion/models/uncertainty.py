"""The uncertainty of the loss, learned beside any network (Kendall et al. 2018; Karras et al. 2024, eq. 14-16, 21).

    L' = mean( L(sigma) / exp u(sigma) + u(sigma) )                                       (1)

is least at u(sigma) = log E L(sigma), where every noise level contributes an expected gradient of one size, however
large its loss: the network is learned as if each level's loss were divided by its running mean. u is one normalised
matrix on Fourier features of the noise level.
"""

from typing import Any

import jax
from flax import nnx

from jax_diffusion.models import magnitude
from jax_diffusion.models.network import Network, from_module

NAME = "uncertainty"  # its key among the parameters


class LogVariance(nnx.Module):
    """u(c_noise), [B] -> [B] float32."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.fourier = magnitude.MPFourier(channels, rngs=rngs)
        self.linear = magnitude.MPConv(channels, 1, rngs=rngs)

    def __call__(self, x, c_noise, cond, key):
        return self.linear(self.fourier(c_noise))[:, 0]


def with_uncertainty(network: Network, channels: int) -> Network:
    """`network` with `log_variance`: its parameters gain the key "uncertainty", which `apply` does not see.

    channels: Fourier features of the noise level; EDM2 has 128.
    """
    head: Any = from_module(lambda rngs: LogVariance(channels, rngs=rngs), project=magnitude.project)

    def without(params: Any) -> Any:
        return {k: v for k, v in params.items() if k != NAME}

    def init(key):
        return network.init(key) | {NAME: head.init(jax.random.fold_in(key, 1))}

    def project(params):
        rest = without(params)
        return (rest if network.project is None else network.project(rest)) | {NAME: head.project(params[NAME])}

    def cached(params, *args, **kwargs):
        assert network.cached is not None
        return network.cached(without(params), *args, **kwargs)

    return network._replace(
        init=init,
        apply=lambda params, *args, **kwargs: network.apply(without(params), *args, **kwargs),
        project=project,
        cached=cached if network.cached else None,
        log_variance=lambda params, c_noise: head.apply(params[NAME], None, c_noise),
    )
