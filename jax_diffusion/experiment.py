"""From a config to the parts of an experiment."""

from typing import Any, NamedTuple

import jax
import numpy as np

from jax_diffusion import conditions, models, process, schedules, solvers, timesteps
from jax_diffusion import config as configs
from jax_diffusion.conditions import Condition
from jax_diffusion.data import Source
from jax_diffusion.models import Network
from jax_diffusion.placement import UNCONSTRAINED, Constraint
from jax_diffusion.process import Gaussian


class Parts(NamedTuple):
    network: Network
    process: Gaussian
    times: Any  # a sampler of timesteps.py
    condition: Condition | None = None  # on an image


def build(
    config: configs.ConfigDict,
    shape: tuple[int, ...],
    num_classes: int,
    constrain: Constraint = UNCONSTRAINED,
) -> Parts:
    """The network, process and time sampler of a config, for samples of `shape` and `num_classes` (0: none)."""
    p = config.process
    condition = conditions.make(config.condition.name, shape, **configs.options(config.condition))
    options = configs.options(config.model)
    if condition is not None:
        options["cond_channels"] = condition.channels
    network = models.make(
        config.model.name,
        shape,
        num_classes=num_classes,
        learn_variance=p.learn_variance,
        constrain=constrain,
        **options,
    )
    gaussian = process.make(
        schedules.make(p.schedule.name, **configs.options(p.schedule)),
        p.prediction,
        p.weighting.name,
        learn_variance=p.learn_variance,
        sigma_data=p.sigma_data,
        raw_inputs=p.raw_inputs,
        **configs.options(p.weighting),
    )
    times = timesteps.make(p.timesteps.name, **configs.options(p.timesteps))
    return Parts(network, gaussian, times, condition)


def default_table(config: configs.ConfigDict, gaussian: Gaussian) -> solvers.Table:
    """The solver that config.sampling names."""
    s = config.sampling
    options = {"variance": "learned"} if gaussian.learn_variance and s.solver == "ddpm" else {}
    made: Any = solvers.make(s.solver, gaussian.schedule, s.steps, s.grid or None, **{**options, **s.options})
    return made


def abstract_batch(source: Source, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and types of one training batch of a source."""
    one = source.batch(np.zeros(1, int))
    return {k: jax.ShapeDtypeStruct((batch_size, *v.shape[1:]), v.dtype) for k, v in one.items()}
