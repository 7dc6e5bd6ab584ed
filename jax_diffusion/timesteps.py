"""Which times to train on.

A time sampler draws t for a batch and the importance weight that keeps the loss's expectation that of uniform
times (1 where the sampler is part of the objective, as in EDM and SD3). One key draws the whole batch: under a
global jit every device then holds its own part of the same draw.

State is an explicit pytree, () for all but the importance sampler, so that it is checkpointed with the rest.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jax_diffusion.errors import check_options, choose
from jax_diffusion.schedules import Schedule


def from_unit(schedule: Schedule, u: jax.Array) -> jax.Array:
    """u in [0, 1) to a time: an integer 0..T-1 (as float32) on discrete schedules, else [t_min, t_max)."""
    if schedule.steps:
        return jnp.minimum(jnp.floor(u * schedule.steps), schedule.steps - 1)
    # Never the end itself: a flow has no noise at 0, and weights in SNR are infinite there.
    return schedule.t_min + jnp.maximum(u, 1e-6) * (schedule.t_max - schedule.t_min)


def to_unit(schedule: Schedule, t: jax.Array) -> jax.Array:
    """The inverse of from_unit; integers map to the middle of their stretch."""
    if schedule.steps:
        return (t + 0.5) / schedule.steps
    return (t - schedule.t_min) / (schedule.t_max - schedule.t_min)


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Independent uniform times (Ho et al. 2020, algorithm 1)."""

    def init(self, schedule: Schedule) -> Any:
        return ()

    def sample(self, state: Any, key: jax.Array, n: int, schedule: Schedule):
        """Returns times [n] and weights [n]."""
        return from_unit(schedule, jax.random.uniform(key, (n,))), jnp.ones((n,))

    def update(self, state: Any, t: jax.Array, loss: jax.Array, schedule: Schedule) -> Any:
        return state


@dataclasses.dataclass(frozen=True)
class Antithetic:
    """One uniform offset and n equal strides: the batch covers time evenly (Kingma et al. 2021, app. I.1).

    Each t is still uniform; the variance of the loss falls. The strides are shuffled over the batch, so that
    position in the batch (label, device) says nothing about the time.
    """

    def init(self, schedule: Schedule) -> Any:
        return ()

    def sample(self, state: Any, key: jax.Array, n: int, schedule: Schedule):
        k_offset, k_order = jax.random.split(key)
        u = jax.random.uniform(k_offset) + jax.random.permutation(k_order, n) / n
        return from_unit(schedule, jnp.mod(u, 1.0)), jnp.ones((n,))

    def update(self, state: Any, t: jax.Array, loss: jax.Array, schedule: Schedule) -> Any:
        return state


@dataclasses.dataclass(frozen=True)
class LogNormal:
    """log(sigma/alpha) ~ N(mean, std^2) (Karras et al. 2022, table 1), brought to time by the inverse."""

    mean: float = -1.2
    std: float = 1.2

    def init(self, schedule: Schedule) -> Any:
        return ()

    def sample(self, state: Any, key: jax.Array, n: int, schedule: Schedule):
        log_sigma = self.mean + self.std * jax.random.normal(key, (n,))
        t = schedule.inverse(-2 * log_sigma)
        if schedule.steps:
            t = jnp.round(t)
        # EDM's objective has no ends; elsewhere time does.
        return (t if schedule.scaling == "ve" else jnp.clip(t, schedule.t_min, schedule.t_max)), jnp.ones((n,))

    def update(self, state: Any, t: jax.Array, loss: jax.Array, schedule: Schedule) -> Any:
        return state


@dataclasses.dataclass(frozen=True)
class LogitNormal:
    """t = sigmoid(N(mean, std^2)) on [0, 1] (Esser et al. 2024, eq. 19)."""

    mean: float = 0.0
    std: float = 1.0

    def init(self, schedule: Schedule) -> Any:
        return ()

    def sample(self, state: Any, key: jax.Array, n: int, schedule: Schedule):
        u = jax.nn.sigmoid(self.mean + self.std * jax.random.normal(key, (n,)))
        return from_unit(schedule, u), jnp.ones((n,))

    def update(self, state: Any, t: jax.Array, loss: jax.Array, schedule: Schedule) -> Any:
        return state


@dataclasses.dataclass(frozen=True)
class Importance:
    """p(t) proportional to sqrt(E[L_t^2]) over `bins` of time (Nichol & Dhariwal 2021, eq. 18).

    Each bin keeps its last `history` losses; until every bin is full, times are uniform. `uniform` of the
    probability stays uniform for ever, so no bin is forgotten. Weights 1 / (bins p) keep the loss unbiased.
    """

    bins: int = 100
    history: int = 10
    uniform: float = 0.001

    def init(self, schedule: Schedule) -> Any:
        bins = min(self.bins, schedule.steps or self.bins)
        return {"losses": jnp.zeros((bins, self.history)), "count": jnp.zeros((bins,), jnp.int32)}

    def probabilities(self, state: Any) -> jax.Array:
        """The share of each bin, [bins]."""
        bins = state["count"].shape[0]
        p = jnp.sqrt(jnp.mean(jnp.square(state["losses"]), axis=1))
        p = (1 - self.uniform) * p / jnp.maximum(jnp.sum(p), 1e-30) + self.uniform / bins
        warm = jnp.all(state["count"] >= self.history)
        return jnp.where(warm, p, jnp.full((bins,), 1 / bins))

    def sample(self, state: Any, key: jax.Array, n: int, schedule: Schedule):
        k_bin, k_within = jax.random.split(key)
        p = self.probabilities(state)
        i = jax.random.choice(k_bin, len(p), (n,), p=p)
        u = (i + jax.random.uniform(k_within, (n,))) / len(p)
        return from_unit(schedule, u), 1 / (len(p) * p[i])

    def update(self, state: Any, t: jax.Array, loss: jax.Array, schedule: Schedule) -> Any:
        """Adds the unweighted losses [n] of times [n], oldest out. A scan, since a bin may occur twice."""
        bins = state["count"].shape[0]
        bin_of = jnp.clip((to_unit(schedule, t) * bins).astype(jnp.int32), 0, bins - 1)

        def push(carry, item):
            losses, count = carry
            i, value = item
            row = jnp.concatenate([losses[i, 1:], value[None]])
            return (losses.at[i].set(row), count.at[i].add(1)), None

        (losses, count), _ = jax.lax.scan(push, (state["losses"], state["count"]), (bin_of, loss))
        return {"losses": losses, "count": jnp.minimum(count, self.history)}


SAMPLERS = {
    "uniform": Uniform,
    "antithetic": Antithetic,
    "log_normal": LogNormal,
    "logit_normal": LogitNormal,
    "importance": Importance,
}


def make(name: str, **options):
    """The time sampler called `name` in SAMPLERS."""
    choose("timesteps", name, SAMPLERS)
    check_options(f"timesteps {name!r}", SAMPLERS[name], options)
    return SAMPLERS[name](**options)
