"""What a run shows of itself: the loss on held-out data and samples, both from the EMA weights."""

from typing import Any

import jax
import numpy as np

from jax_diffusion import io, lowering, placement, sharding
from jax_diffusion import model as models
from jax_diffusion.data import augment
from jax_diffusion.train.setup import Setup, eval_indices
from jax_diffusion.train.step import make_eval_step
from jax_diffusion.train.writers import MetricWriter


class Validator:
    """`validator(ema) -> float`: the mean loss over eval_batches fixed batches at fixed times and noise."""

    def __init__(self, s: Setup, shardings):
        held_out = s.held_out
        assert held_out is not None  # without one there is no validation
        t, n = s.config.train, len(held_out)
        self.batches = max(1, min(t.eval_batches, -(-n // t.batch_size)))
        place = sharding.batch_sharding(s.mesh)
        step = make_eval_step(
            s.parts.network, s.parts.process, s.parts.times, seed=s.config.seed, condition=s.parts.condition
        )
        self.mesh, self._step = s.mesh, lowering.jit(step, in_shardings=(shardings.ema, place, None))
        indices = eval_indices(n, t.batch_size, self.batches)
        self._batch = lambda i: jax.device_put(held_out.batch(indices[i]), place)

    def __call__(self, ema) -> float:
        with placement.tracing_for(self.mesh):
            losses = [self._step(ema, self._batch(i), i) for i in range(self.batches)]
        return float(np.mean(jax.device_get(losses)))


class Artist:
    """`artist(step, ema)`: a grid of samples into workdir/samples and TensorBoard. The seed never changes, so
    that a film of the files shows one set of images sharpen.

    Where the model is conditioned on images they are those of held-out pictures, and the grid shows condition,
    sample, original side by side.
    """

    def __init__(self, s: Setup, writer: MetricWriter):
        self.s, self.writer, self.options = s, writer, s.config.sampling
        self.model = models.make(s.config, None, s.shape, s.class_names, 0, s.parts)
        self.table = self.model.default_table()
        # A row of ten digits, a row of five flowers: a column shows one class.
        self.columns = io.class_columns(len(s.class_names))
        self.labels: Any = list(range(len(s.class_names))) or None
        self.originals = None
        if s.parts.condition is not None:
            source = s.source if s.held_out is None else s.held_out
            batch = source.batch(np.linspace(0, len(source) - 1, self.options.num).astype(int))
            self.originals = np.asarray(augment.to_float(batch["image"]))
            self.labels = batch["label"] if self.labels else None

    def __call__(self, step: int, ema) -> None:
        samples = self.model.with_params(ema, step).sample(
            jax.random.key(self.s.config.seed),
            self.table,
            self.options.num,
            labels=self.labels,
            images=self.originals,
            guidance=self.options.guidance,
            batch_size=self.options.batch_size,
            mesh=self.s.mesh,
        )
        if jax.process_index() == 0:
            picture = io.grid(samples, columns=self.columns)
            if self.originals is not None:
                shown = self.model.condition_images(self.originals)
                picture = io.side_by_side(shown, samples, self.originals)
            io.save_picture(self.s.workdir / "samples" / f"step_{step:08d}.png", picture)
            self.writer.write_images(step, {"samples": picture})
