"""A run's computations on a mesh, without its data: nothing is allocated until `create` or a compiled step runs.

The trainer, `bench` and `plan` all take the training step from here, so what is timed and planned is what trains.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jax_diffusion import config as configs
from jax_diffusion import experiment, lowering, placement, sharding
from jax_diffusion.train import metrics, optim, state, step


class Program(NamedTuple):
    """See `build`."""

    config: configs.ConfigDict
    mesh: jax.sharding.Mesh
    shape: tuple[int, ...]  # of one sample
    num_classes: int
    parts: experiment.Parts
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule
    init: Callable[[jax.Array], state.TrainState]

    def abstract_state(self) -> tuple[state.TrainState, state.TrainState]:
        """The state's shapes and types, placed, and its shardings."""
        shapes = jax.eval_shape(self.init, jax.random.key(0))
        shardings = sharding.tree_shardings(self.mesh, shapes, self.config.mesh.rules)
        return sharding.abstract(shapes, shardings), shardings

    def create(self, key: jax.Array) -> tuple[state.TrainState, state.TrainState]:
        """The initial state, made in its shards, and its shardings."""
        return state.create(self.init, key, self.mesh, self.config.mesh.rules)

    def replication_note(self) -> str:
        """A line for the log where much of the state is on every device against the mesh's wish; or ""."""
        shapes = jax.eval_shape(self.init, jax.random.key(0))
        return sharding.replication_note(self.mesh, shapes, self.config.mesh.rules)

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """A batch of uint8 images and int32 labels. Data that is not images says its own, experiment.abstract_batch."""
        size = self.config.train.batch_size
        batch = {"image": jax.ShapeDtypeStruct((size, *self.shape), jnp.uint8)}
        return batch | ({"label": jax.ShapeDtypeStruct((size,), jnp.int32)} if self.num_classes else {})

    @property
    def _objective_options(self) -> dict:
        c = self.config
        return {
            "seed": c.seed,
            "rng": c.train.rng,
            "condition": self.parts.condition,
            "flip": c.data.flip,
            "label_dropout": c.train.label_dropout,
            "accumulate": c.train.accumulate,
        }

    def objective(self) -> step.Objective:
        """The part of the training step before the optimizer."""
        parts = self.parts
        return step.make_objective(parts.network, parts.process, parts.times, **self._objective_options)

    def train_step(self) -> Callable:
        """(state, batch) -> (state, metrics), not compiled."""
        c, parts = self.config, self.parts
        return step.make_train_step(
            parts.network,
            parts.process,
            parts.times,
            self.optimizer,
            ema_decay=c.ema.decay,
            ema_warmup=c.ema.warmup,
            ema_profiles=c.ema.profiles,
            spike=c.train.spike,
            one_device=self.mesh.size == 1,
            **self._objective_options,
        )

    def vitals(self) -> Callable[[state.TrainState], dict[str, jax.Array]]:
        """metrics.make_vitals, compiled."""
        abstract, shardings = self.abstract_state()
        function = metrics.make_vitals(self.config.optim, self.learning_rate)
        platform = self.mesh.devices.flat[0].platform
        options = {"in_shardings": (shardings,), "out_shardings": sharding.replicated(self.mesh)}
        jitted: Any = lowering.jit(function, platform, **options)
        return jitted.lower(abstract).compile()

    def trace(self, batch: dict[str, jax.ShapeDtypeStruct] | None = None, steps: int = 1):
        """The traced training step: `.jaxpr` to count, `.lower().compile()` to run.

        batch: shapes and types of one batch; None is abstract_batch.  steps: more than one scans over batches
            [steps, B, ...] in one dispatch, as does config.train.steps_per_dispatch > 1 with any number.
        """
        several = steps > 1 or self.config.train.steps_per_dispatch > 1
        batch = self.abstract_batch() if batch is None else batch
        run = self.train_step()
        if several:
            run = step.several(run)
            batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct((steps, *a.shape), a.dtype), batch)
        abstract, shardings = self.abstract_state()
        jitted = step.compile_step(run, shardings, self.mesh, leading=int(several))
        with placement.tracing_for(self.mesh):
            return jitted.trace(abstract, batch)


def build(config: configs.ConfigDict, shape: tuple[int, ...], num_classes: int, mesh: jax.sharding.Mesh) -> Program:
    """The program of a config for samples of `shape` and `num_classes` (0: none). Raises UserError as its parts do."""
    sharding.check_batch(mesh, config.train.batch_size, config.train.accumulate)
    optimizer, learning_rate = optim.make(config.optim, config.train.steps)
    parts = experiment.build(config, shape, num_classes, placement.Constraint(mesh))
    # Jitted here, because then shapes, shardings and the initial state itself trace it once among them.
    init = jax.jit(state.make_init(parts.network, optimizer, parts.times, parts.process, len(config.ema.profiles)))
    built = Program(config, mesh, tuple(shape), num_classes, parts, optimizer, learning_rate, init)
    if mesh.shape["tensor"] > 1:
        abstract, _ = built.abstract_state()
        sharding.check_tensor(mesh, abstract.params, f"model={config.model.name}")
    return built
