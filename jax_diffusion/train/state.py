"""What a training run is at one instant: arrays only. The rest is a function of its step."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jax_diffusion import sharding
from jax_diffusion.models import Network
from jax_diffusion.process import Gaussian
from jax_diffusion.train import guard


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """step: int32 []; params, ema: the network's dict; opt_state: optax's; timesteps: the time sampler's; averages:
    a dict like params for each power-function profile; faults: the counters of guard.py."""

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any
    timesteps: Any
    averages: tuple = ()
    faults: dict[str, jax.Array] = dataclasses.field(default_factory=guard.fresh)


def make_init(network: Network, optimizer: optax.GradientTransformation, times, process: Gaussian, profiles: int = 0):
    """`init(key) -> TrainState`. The EMA and the `profiles` further averages start at the parameters."""

    def init(key: jax.Array) -> TrainState:
        params = network.init(key)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=optimizer.init(params),
            # A copy: donating the state may not hand the same buffer over twice.
            ema=jax.tree.map(jnp.copy, params),
            timesteps=times.init(process.schedule),
            averages=tuple(jax.tree.map(jnp.copy, params) for _ in range(profiles)),
            faults=guard.fresh(),
        )

    return init


def create(init, key: jax.Array, mesh, rules=sharding.DEFAULT_RULES) -> tuple[TrainState, TrainState]:
    """The initial state, made directly in its shards, and its shardings."""
    shardings = sharding.tree_shardings(mesh, jax.eval_shape(init, key), rules)
    return jax.jit(init, out_shardings=shardings)(key), shardings
