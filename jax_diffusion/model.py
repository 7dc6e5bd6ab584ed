"""A trained model: `load` it from a workdir, `sample` from it."""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_diffusion import config as configs
from jax_diffusion import experiment, guidance, sharding
from jax_diffusion.errors import UserError
from jax_diffusion.models import Network
from jax_diffusion.process import Gaussian
from jax_diffusion.solvers.table import Table, sample


def _make_generate(network: Network, process: Gaussian) -> Callable:
    """The one compiled function behind Model.sample. Solver, guidance scale, labels and seed are data."""

    def generate(params, key, table, indices, cond, scale, *, shape, guided, clip, trajectory):
        conditional = guidance.model_denoiser(process, network.apply, params)
        if guided:
            null = {**cond, "label": jnp.full_like(cond["label"], network.num_classes)}
            denoise = guidance.classifier_free(conditional, cond, null, scale)
        else:
            denoise = guidance.condition(conditional, cond)
        if clip:
            denoise = guidance.clip(denoise)
        return sample(key, denoise, table, shape, indices=indices, trajectory=trajectory)

    return jax.jit(generate, static_argnames=("shape", "guided", "clip", "trajectory"))


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A network with its parameters and all that is needed to sample from it."""

    config: configs.ConfigDict
    network: Network
    process: Gaussian
    params: Any
    shape: tuple[int, ...]  # of one sample, (H, W, C) or (D,)
    class_names: tuple[str, ...]  # () for unconditional models
    step: int  # training steps behind the parameters
    generate: Callable

    def with_params(self, params: Any, step: int) -> "Model":
        """The same model and compiled program with other parameters."""
        return dataclasses.replace(self, params=params, step=step)

    def default_table(self) -> Table:
        """The solver that the recipe samples with."""
        return experiment.default_table(self.config, self.process)

    def sample(
        self,
        key: jax.Array,
        table: Table | None = None,
        num: int = 1,
        *,
        labels: Any = None,
        guidance: float = 1.0,
        batch_size: int = 64,
        trajectory: bool = False,
        mesh=None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ):
        """Draws `num` samples, [num, *shape] float32 in [-1, 1] (unclipped where the recipe says so).

        Sample i depends on the key, the table, its label and i alone: neither the batch size nor the number of
        devices changes it.

        Args:
          key:        jax.random.key(seed).
          table:      from solvers.make; None is the recipe's own.
          labels:     a class index, a sequence of `num` (or fewer: repeated in turn), or None: no condition.
          guidance:   scale of classifier-free guidance; 1 is none.
          batch_size: samples per call of the compiled program; larger requests run in several calls.
          trajectory: also return x0_hat at every evaluation, [N, num, *shape].
          mesh:       sharding.make_mesh(...); None uses all devices, data parallel.
          progress:   called as progress(done, num) after each call.
        """
        table = self.default_table() if table is None else table
        mesh = sharding.make_mesh() if mesh is None else mesh
        parts = sharding.batch_shards(mesh)
        batch_size = -(-min(batch_size, num) // parts) * parts
        guided = labels is not None and guidance != 1.0  # without a condition there is nothing to guide by
        labels = self._labels(labels, num)
        place = sharding.batch_sharding(mesh)
        outputs, films = [], []
        for start in range(0, num, batch_size):
            # The last call is filled up with samples that are thrown away: one shape, one program.
            indices = np.arange(start, start + batch_size)
            cond = {} if labels is None else {"label": labels[np.minimum(indices, num - 1)]}
            indices, cond = jax.device_put((indices.astype(np.int32), cond), place)
            out = self.generate(
                self.params, key, table, indices, cond, jnp.float32(guidance),
                shape=self.shape, guided=guided, clip=self.config.sampling.clip, trajectory=trajectory,
            )  # fmt: skip
            out = _gather(out)
            outputs.append(out[0] if trajectory else out)
            if trajectory:
                films.append(out[1])
            progress(min(start + batch_size, num), num)
        images = np.concatenate(outputs)[:num]
        return (images, np.concatenate(films, axis=1)[:, :num]) if trajectory else images

    def _labels(self, labels, num: int) -> np.ndarray | None:
        classes = self.network.num_classes
        if labels is None:
            # A conditional network asked for no condition is shown its null label.
            return np.full((num,), classes, np.int32) if classes else None
        if not classes:
            raise UserError(f"labels={labels}: this model was trained without labels; leave them out")
        labels = np.atleast_1d(np.asarray(labels, np.int32))
        if labels.min() < 0 or labels.max() >= classes:
            raise UserError(f"labels={labels.tolist()}: the classes are 0 to {classes - 1}")
        return np.resize(labels, num)


def _gather(x):
    """Device arrays to NumPy; across processes, all parts."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(x, tiled=True)
    return jax.device_get(x)


def make(config, params, shape, class_names, step: int, parts: experiment.Parts) -> Model:
    """A Model around parameters one already has."""
    generate = _make_generate(parts.network, parts.process)
    return Model(config, parts.network, parts.process, params, tuple(shape), tuple(class_names), step, generate)


def read_meta(workdir: str | pathlib.Path) -> tuple[configs.ConfigDict, dict[str, Any]]:
    """The config and the data's facts ("shape", "class_names") of a workdir. UserError where there are none."""
    workdir = pathlib.Path(workdir)
    try:
        config = configs.from_json((workdir / "config.json").read_text())
        facts = json.loads((workdir / "dataset.json").read_text())
    except FileNotFoundError:
        raise UserError(
            f"--workdir={workdir} holds no training run: train one with "
            f"`jax-diffusion train --config=digits --workdir={workdir}`"
        ) from None
    return config, facts


def load(workdir: str | pathlib.Path, *, step: int | None = None, ema: bool = True) -> Model:
    """The model of a training run.

    step: which checkpoint, None for the newest.  ema: the averaged weights, else the raw ones.
    Raises UserError where there is no such workdir or checkpoint.
    """
    from jax_diffusion.train import checkpoint

    config, facts = read_meta(workdir)
    shape, names = tuple(facts["shape"]), tuple(facts["class_names"])
    parts = experiment.build(config, shape, len(names))
    shapes = jax.eval_shape(parts.network.init, jax.random.key(0))
    whole = sharding.tree_shardings(sharding.make_mesh(), shapes, rules=())  # on every device
    params, step = checkpoint.restore_weights(workdir, sharding.abstract(shapes, whole), step=step, ema=ema)
    return make(config, params, shape, names, step, parts)
