"""A trained model: `load` it from a workdir, `sample` from it."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_diffusion import caching, editing, experiment, generating, placement, precision, sharding
from jax_diffusion import config as configs
from jax_diffusion.conditions import Condition
from jax_diffusion.data import augment
from jax_diffusion.errors import UserError
from jax_diffusion.guidance import model as guiding
from jax_diffusion.models import Network
from jax_diffusion.process import Gaussian
from jax_diffusion.solvers import Table


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
    condition: Condition | None = None  # on an image

    def with_params(self, params: Any, step: int) -> "Model":
        """The same model and compiled program with other parameters."""
        return dataclasses.replace(self, params=params, step=step)

    def cast(self, dtype: str) -> "Model":
        """The same model with its matmuls and convolutions in `dtype`, "bfloat16" or "float32".

        Parameters that are used in that type alone are stored in it, once (precision.py). Norms, softmax, time
        embedding and the solver's state stay float32. Raises UserError for networks of one type.
        """
        if "dtype" not in self.config.model:
            raise UserError(f"dtype={dtype}: a network {self.config.model.name!r} computes in float32 alone")
        config = self.config.copy_and_resolve_references()
        config.model.dtype = dtype
        parts = experiment.build(config, self.shape, len(self.class_names))
        params = self.params
        if dtype != "float32":
            params = precision.rounded(parts.network.apply, params, self.network_inputs(), dtype)
        return make(config, params, self.shape, self.class_names, self.step, parts)

    def network_inputs(self, num: int = 1) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct, dict]:
        """Shapes and types of what the network is given for `num` samples: (x, c_noise, cond)."""
        cond = {}
        if self.network.num_classes:
            cond["label"] = jax.ShapeDtypeStruct((num,), jnp.int32)
        if self.condition is not None:
            cond["image"] = jax.ShapeDtypeStruct((num, *self.shape[:2], self.condition.channels), jnp.float32)
        return jax.ShapeDtypeStruct((num, *self.shape), jnp.float32), jax.ShapeDtypeStruct((num,), jnp.float32), cond

    def predicted_speedup(self, cache: caching.Cache, evaluations: int) -> float:
        """How many times fewer FLOPs a cache makes of so many evaluations."""
        return caching.predicted_speedup(self.network, self.params, self.network_inputs(), cache, evaluations)

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
        images: Any = None,
        start: Any = None,
        known: Any = None,
        mask: Any = None,
        guidance: Any = 1.0,
        negative: Any = None,
        autoguide: Any = None,
        threshold: float | None = None,
        clip: bool | None = None,
        cache: caching.Cache | int | None = None,
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
          images:     for models conditioned on an image, what to make samples of: [N, H, W, C] clean pictures, or
                      [N, h, w, c] small or grey ones as `condition.observed` says, uint8 or float in [-1, 1];
                      fewer than `num` are repeated in turn.
          start:      [num, *shape] states to start from at the table's first time, instead of noise.
          known:      [num, *shape] images to inpaint: their pixels under the mask are kept (editing.inpaint).
          mask:       bool [H, W], [num, H, W] or [num, H, W, 1 or C]; True is known.
          guidance:   scale of guidance by the labels, 1 is none; a sequence of `num` (or fewer: repeated in turn);
                      or guidance.Settings, with an interval, rescaling or projection.
          negative:   labels to lead away from instead of from the average sample, given as `labels` are.
          autoguide:  a weaker Model, or parameters of this one from early in training: what to lead away from, with
                      labels or without (guidance.autoguide).
          threshold:  percentile of dynamic thresholding, in place of clipping; None is the recipe's (mostly none).
          clip:       x0_hat to [-1, 1]; None is the recipe's choice.
          cache:      run the inner layers at some evaluations only, caching.Cache(every=3, depth=1) or 3; takes a
                      table, a U-Net or DiT, and guidance neither by interval nor by another network.
          batch_size: samples per call of the compiled program; larger requests run in several calls.
          trajectory: also return x0_hat at every evaluation, [N, num, *shape].
          mesh:       sharding.make_mesh(...); None uses all devices, data parallel.
          progress:   called as progress(done, num) after each call.
        """
        table = self.default_table() if table is None else table
        mesh = sharding.make_mesh() if mesh is None else mesh
        weak, weak_kind = guiding.weak_network(self, autoguide)
        samples, shared = self.request(num, labels, images, guidance, negative, weak, threshold)
        refreshes, depth = caching.request(cache, self.network, table, shared)
        begin = self.start(start, known, mask, num)
        if "known" in begin:
            editing.check_table(table)
        clip = self.config.sampling.clip if clip is None else clip
        outputs, films, done = [], [], 0
        for indices, (rows, x) in self.batches(num, batch_size, mesh, (samples, begin)):
            with placement.tracing_for(mesh):
                out = self.generate(
                    self.params, key, table, indices, rows, shared, x, refreshes,
                    shape=self.shape, clip=clip, trajectory=trajectory, weak=weak_kind, depth=depth,
                )  # fmt: skip
            out = generating.gather(out)
            outputs.append(out[0] if trajectory else out)
            if trajectory:
                films.append(out[1])
            done += len(indices)
            progress(min(done, num), num)
        images = np.concatenate(outputs)[:num]
        return (images, np.concatenate(films, axis=1)[:, :num]) if trajectory else images

    def batches(self, num: int, batch_size: int, mesh, inputs: Any) -> Iterator[tuple[jax.Array, Any]]:
        """(indices, their rows of `inputs`) of each call for `num` samples, on the devices of `mesh`."""
        parts, place = sharding.batch_shards(mesh), sharding.batch_sharding(mesh)
        batch_size = -(-min(batch_size, num) // parts) * parts
        for start in range(0, num, batch_size):
            # The last call is filled up with samples that are thrown away: one shape, one program.
            indices = np.arange(start, start + batch_size, dtype=np.int32)
            rows = np.minimum(indices, num - 1)
            yield jax.device_put((indices, jax.tree.map(lambda v, rows=rows: v[rows], inputs)), place)

    def denoiser(
        self,
        num: int,
        *,
        labels: Any = None,
        images: Any = None,
        guidance: Any = 1.0,
        negative: Any = None,
        autoguide: Any = None,
        threshold: float | None = None,
        clip: bool | None = None,
    ) -> dict[str, Any]:
        """`denoiser`, `params` and `cond` of `num` samples for solvers.optimize; arguments as for `sample`."""
        weak, weak_kind = guiding.weak_network(self, autoguide)
        cond, shared = self.request(num, labels, images, guidance, negative, weak, threshold)
        clip = self.config.sampling.clip if clip is None else clip

        def denoiser(params, samples):
            params, shared = params
            return guiding.denoiser(
                self.network.apply, self.process, params, samples, shared, clipped=clip, weak=weak_kind
            )

        return {"denoiser": denoiser, "params": (self.params, shared), "cond": cond}

    def request(
        self, num, labels=None, images=None, guidance=1.0, negative=None, weak=None, threshold=None
    ) -> tuple[dict, dict]:
        """What guidance.model.denoiser is given for `num` samples: arrays of a row per sample, and those they share."""
        cond = {"label": self._labels(labels, num), "image": self._images(images, num)}
        cond = {k: v for k, v in cond.items() if v is not None}
        if negative is not None:
            negative = self._labels(negative, num)
        if threshold is None:
            threshold = self.config.sampling.threshold or None
        return guiding.request(num, cond, self.network.num_classes, guidance, negative, weak, threshold)

    def condition_images(self, images: Any) -> np.ndarray:
        """What the network is shown of `images` (see `sample`): [N, H, W, channels] float32 in [-1, 1]."""
        if self.condition is None:
            raise UserError("images: this model is not conditioned on an image; leave them out")
        images = np.asarray(augment.to_float(np.asarray(images)), np.float32)
        # A small or grey picture is what was observed already.
        full = images.ndim == 4 and images.shape[1:] == self.shape
        if not full and images.shape[1:] != self.condition.observed:
            raise UserError(
                f"images of shape {images.shape}: give [N, {', '.join(map(str, self.shape))}] clean ones or "
                f"[N, {', '.join(map(str, self.condition.observed))}]"
            )
        return np.asarray((self.condition.apply if full else self.condition.present)(jnp.asarray(images)))

    def _images(self, images, num: int) -> np.ndarray | None:
        if images is None:
            if self.condition is None:
                return None
            raise UserError(
                f"this model is conditioned on an image ({self.condition.name}): give it some, with "
                "`jax-diffusion upscale` or `colorize`, or sample(images=...)"
            )
        shown = self.condition_images(images)
        return shown[np.arange(num) % len(shown)]

    def start(self, start, known, mask, num: int) -> dict[str, np.ndarray]:
        """What `generate` starts from, arrays of `num` samples."""
        if known is None and mask is None:
            return {} if start is None else {"x": self._states("start", start, num)}
        if known is None or mask is None or start is not None:
            raise UserError("inpainting needs both known= and mask=, and makes its own start")
        mask = np.asarray(mask, bool)
        if len(self.shape) == 3 and mask.ndim in (2, 3):
            mask = mask[..., None]  # [H, W], [num, H, W]
        try:
            mask = np.broadcast_to(mask, (num, *self.shape))
        except ValueError:
            raise UserError(f"mask of shape {mask.shape}: images of {self.shape} take [H, W] or [num, H, W]") from None
        return {"known": self._states("known", known, num), "mask": mask}

    def _states(self, name: str, states, num: int) -> np.ndarray:
        states = np.asarray(states, np.float32)
        if states.shape != (num, *self.shape):
            raise UserError(f"{name} of shape {states.shape}: {num} samples need {(num, *self.shape)}")
        return states

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


def make(config, params, shape, class_names, step: int, parts: experiment.Parts, platform: str | None = None) -> Model:
    """A Model around parameters one already has. platform: it is compiled for; None is the default backend's."""
    generate = generating.make(parts.network, parts.process, platform)
    return Model(
        config, parts.network, parts.process, params, tuple(shape), tuple(class_names), step, generate, parts.condition
    )


def load(
    workdir: str | pathlib.Path, *, step: int | None = None, ema: bool = True, ema_std: float | None = None
) -> Model:
    """The model of a training run.

    step: which checkpoint, None for the newest.  ema: the averaged weights, else the raw ones.
    ema_std: in place of a checkpoint, the average of this relative width that `jax-diffusion ema` has made.
    Raises UserError where there is no such workdir or checkpoint.
    """
    from jax_diffusion.train import checkpoint, posthoc
    from jax_diffusion.train.workdir import read_meta

    config, facts = read_meta(workdir)
    shape, names = tuple(facts["shape"]), tuple(facts["class_names"])
    parts = experiment.build(config, shape, len(names))
    shapes = jax.eval_shape(parts.network.init, jax.random.key(0))
    whole = sharding.tree_shardings(sharding.make_mesh(), shapes, rules=())  # on every device
    if ema_std is not None and not ema:
        raise UserError(f"--ema_std={ema_std:g} is an average, and --no-ema asks for the raw weights: leave one out")
    if ema_std is not None:
        params, step = posthoc.load(workdir, ema_std, shapes, step)
        params = jax.device_put(params, whole)
    else:
        params, step = checkpoint.restore_weights(workdir, sharding.abstract(shapes, whole), step=step, ema=ema)
    return make(config, params, shape, names, step, parts)
