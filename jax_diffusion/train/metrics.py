"""What a step says of itself, and the norms that are worth a program of their own once a logging period.

On the device: `loss_by_time` within the step, `make_vitals` beside it. On the host: `summarise` of a period, `memory`.
"""

import math
import resource
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_diffusion import sharding, timesteps
from jax_diffusion.schedules import Schedule
from jax_diffusion.train import optim
from jax_diffusion.train.state import TrainState

BUCKETS = 4  # of time, equally long
LAYERS = 4  # groups that the layers of one stack are reported in


def bucket_names() -> list[str]:
    """loss_t/0.00-0.25, ...: the mean loss of the samples whose time, as a share of its range, lies there."""
    return [f"loss_t/{i / BUCKETS:.2f}-{(i + 1) / BUCKETS:.2f}" for i in range(BUCKETS)]


def share_of_time(schedule: Schedule, t: jax.Array) -> jax.Array:
    """Times as shares of their range, in [0, 1]; where a time is a noise level of any size (EDM), of its logarithm."""
    if schedule.steps or schedule.t_max <= 1:
        return timesteps.to_unit(schedule, t)
    low, high = math.log(schedule.t_min), math.log(schedule.t_max)
    return (jnp.log(t) - low) / (high - low)


def loss_by_time(schedule: Schedule, t: jax.Array, losses: jax.Array) -> jax.Array:
    """Sums and numbers of losses [n] by buckets of their times [n]: [2, BUCKETS], which add up over steps."""
    bucket = jnp.clip((share_of_time(schedule, t) * BUCKETS).astype(jnp.int32), 0, BUCKETS - 1)
    inside = bucket[:, None] == jnp.arange(BUCKETS)[None]
    return jnp.stack([jnp.sum(jnp.where(inside, losses[:, None], 0.0), 0), jnp.sum(inside.astype(jnp.float32), 0)])


class Summary(NamedTuple):
    """One logging period."""

    scalars: dict[str, float]
    in_a_row: np.ndarray  # [steps]: how many steps up to each were skipped in a row


def summarise(dispatches: Sequence[tuple[int, dict[str, np.ndarray]]]) -> Summary:
    """Of (steps, their metrics) on the host, in order: means over the steps that count; where none does, no loss."""
    shapes = {"by_time": (2, BUCKETS)}  # of one step; all others are scalars
    stacked = {
        k: np.concatenate([np.reshape(m[k], (n, *shapes.get(k, ()))) for n, m in dispatches]) for k in dispatches[0][1]
    }
    counters = {k: stacked.pop(k) for k in ("skipped", "spikes", "in_a_row") if k in stacked}
    good = counters["in_a_row"] == 0
    scalars = {}
    if good.any():
        total, number = stacked.pop("by_time")[good].sum(0, dtype=np.float64)
        scalars = {k: float(v[good].mean(dtype=np.float64)) for k, v in stacked.items()}
        scalars |= {k: float(a / n) for k, a, n in zip(bucket_names(), total, number, strict=True) if n}
    scalars |= {k: int(v[-1]) for k, v in counters.items() if k != "in_a_row"}
    return Summary(scalars, counters["in_a_row"])


def _squares(tree: Any) -> dict[str, jax.Array]:
    """The sum of squares of each block: a part of the network by its name, each of a list of parts, and the layers of
    a stack in LAYERS groups."""
    blocks: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        names = sharding.path_name(path).split("/")
        block = "/".join(names[:2]) if len(names) > 1 and names[1].isdigit() else names[0]
        stacked = bool(sharding.STACKED.search("/".join(names))) and leaf.ndim > 0
        axes = tuple(range(1, leaf.ndim)) if stacked else None
        blocks[block] = blocks.get(block, 0.0) + jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=axes)
    out = {}
    for block, squares in blocks.items():
        if squares.ndim == 0:
            out[block] = squares
            continue
        for part in np.array_split(np.arange(len(squares)), min(LAYERS, len(squares))):
            out[f"{block}/{part[0]}-{part[-1]}"] = jnp.sum(squares[part[0] : part[-1] + 1])
    return out


def make_vitals(config: Any, learning_rate: Callable) -> Callable[[TrainState], dict[str, jax.Array]]:
    """`vitals(state)`: scalars that read every parameter, so that each step can do without them.

    learning_rate: of the last update.  param_norm, param_norm/BLOCK.  ema_distance: |ema - params| / |params|.
    update_ratio: |last update| / |params|, before a projection.  rollbacks: made so far.
    """

    def norm(tree):
        return jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree)))

    def vitals(state: TrainState) -> dict[str, jax.Array]:
        squares = _squares(state.params)
        size = jnp.sqrt(sum(squares.values()))
        rate, update = optim.last_update(config, learning_rate, state.opt_state, state.params)
        small = jnp.finfo(jnp.float32).tiny
        return {
            "learning_rate": rate,
            "param_norm": size,
            "ema_distance": norm(jax.tree.map(jnp.subtract, state.ema, state.params)) / jnp.maximum(size, small),
            "update_ratio": norm(update) / jnp.maximum(size, small),
            "rollbacks": state.faults["rollbacks"],
            **{f"param_norm/{block}": jnp.sqrt(value) for block, value in squares.items()},
        }

    return vitals


def memory(devices: Sequence[jax.Device]) -> dict[str, float]:
    """The most bytes ever in use: memory/device_peak, of the fullest of this process's devices, where its backend says
    so; else (CPUs) memory/host_peak, of this process."""
    stats = [d.memory_stats() for d in devices if d.process_index == jax.process_index()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    if peaks:
        return {"memory/device_peak": float(max(peaks))}
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return {"memory/host_peak": float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)}
