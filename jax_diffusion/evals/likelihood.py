"""Bits per dimension of real images under a trained model, with standard errors."""

import functools
import math
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_diffusion import bound, generating, guidance, likelihood, sharding, solvers
from jax_diffusion.data import Source, to_float
from jax_diffusion.errors import UserError
from jax_diffusion.model import Model

TOLERANCE = 1e-4  # of the ODE; on eight MNIST digits 1e-5 moves the mean by 0.0001 bits/dim, 1e-3 by 0.03
EXACT_UP_TO = 16  # dimensions for which the divergence is taken exactly
CONTINUOUS_TIMES = 64


class Measured(NamedTuple):
    """A mean over images; bits per dimension of 8-bit images, nats per dimension of anything else."""

    mean: float
    stderr: float  # over images and draws
    draws_stderr: float | None  # the part of it that more draws an image would remove; None of one draw
    images: int
    failed: int  # images left out of the mean, which the ODE solver gave up on
    unit: str
    evaluations: float  # of the network (with its derivative for an exact likelihood), an image and draw


def bpd(model: Model, source: Source, num: int, **options) -> Measured:
    """The exact likelihood of the probability-flow ODE (likelihood.py), on `num` random examples of a source.

    8-bit images are dequantised uniformly, with a Rademacher probe: one of each a draw. Points and float images give
    the density itself, in nats per dimension. Options as in `_measure`.
    """
    quantised = _is_8_bit(source)
    exact = math.prod(model.shape) <= EXACT_UP_TO
    solver = solvers.make("rk45", model.process.schedule, 50, rtol=TOLERANCE, atol=TOLERANCE)

    def of(denoise, solver, key, indices, x0):
        if quantised:
            x0 = likelihood.dequantize(jax.random.fold_in(key, 0), x0, indices)
        out = likelihood.log_likelihood(
            jax.random.fold_in(key, 1),
            denoise,
            solver,
            x0,
            divergence="exact" if exact else "rademacher",
            indices=indices,
        )
        nats = -out.log_prob / math.prod(model.shape)
        return likelihood.bits_per_dim(out.log_prob, model.shape) if quantised else nats, out.evaluations

    program = _program(model, ("bpd", quantised), of)
    return _measure(program, model, solver, source, num, "bits" if quantised else "nats", **options)


def vlb(model: Model, source: Source, num: int, steps: int | None = None, **options) -> Measured:
    """The variational bound (bound.py) of 8-bit images.

    steps: of the chain on a discrete schedule (None: all), or draws of a time on a continuous one (None: 64).
    A variance that was not learned is fixed_large, the tighter bound of the two. The prediction is clipped where the
    recipe clips: any denoiser gives a bound.
    """
    if not _is_8_bit(source):
        raise UserError("--metrics=vlb needs 8-bit images; for points and float data use --metrics=bpd")
    schedule: Any = model.process.schedule
    variance = "learned" if model.process.learn_variance else "fixed_large"

    def of(denoise, _, key, indices, x0):
        if model.config.sampling.clip:
            denoise = guidance.clip(denoise)
        if schedule.steps:
            by_step = bound.variational_bound(
                key, denoise, schedule, x0, variance=variance, steps=steps, indices=indices
            )  # fmt: skip
            return by_step.total, jnp.full(x0.shape[:1], by_step.terms.shape[0])
        times = steps or CONTINUOUS_TIMES
        out = bound.continuous_bound(key, denoise, schedule, x0, times=times, indices=indices)
        return out.total, jnp.full(x0.shape[:1], times)

    return _measure(_program(model, ("vlb", steps), of), model, (), source, num, "bits", **options)


def includes(metric: str, model: Model, measured: Measured) -> str:
    """One line that says what the number is of."""
    given = "given the true labels, " if model.network.num_classes else ""
    if metric == "bpd":
        what = (
            "8-bit images dequantised uniformly, which bounds their own bits from above"
            if measured.unit == "bits"
            else "the density itself, in nats and in the units the model sees: it may be negative"
        )
        return f"{given}no guidance, no clipping; exact likelihood of the probability-flow ODE; {what}"
    discrete = model.process.schedule.steps is not None
    learned = "learned variance" if model.process.learn_variance else "variance fixed_large"
    chain = f"all {measured.evaluations:.0f} terms of a chain, {learned}"
    what = chain if discrete else "the continuous-time bound"
    return f"{given}no guidance; upper bound of the bits of 8-bit images: {what}, decoder and prior included"


def _is_8_bit(source: Source) -> bool:
    return source.batch(np.zeros(1, int))["image"].dtype == np.uint8


_PROGRAMS: weakref.WeakKeyDictionary[Model, dict[tuple, Callable]] = weakref.WeakKeyDictionary()


def _program(model: Model, key: tuple, of: Callable) -> Callable:
    """`of(denoise, solver, key, indices, x0) -> (value, evaluations) [B]` as one program; a model compiles each `key`
    once, whatever it measures with it."""
    programs = _PROGRAMS.setdefault(model, {})
    if key not in programs:
        programs[key] = jax.jit(functools.partial(_run, of, model.process, model.network.apply))
    return programs[key]


def _measure(
    program: Callable,
    model: Model,
    solver: Any,
    source: Source,
    num: int,
    unit: str,
    *,
    seed: int = 0,
    draws: int = 1,
    batch_size: int = 50,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Measured:
    """A `_program` over `num` examples, true labels given.

    seed: of the choice of examples and of all noise.  draws: independent ones an image.
    """
    num = min(num, len(source))
    if num < 2 or draws < 1:
        raise UserError(f"--likelihood_images={num} --likelihood_draws={draws}: use at least 2 and 1")
    chosen = np.random.default_rng(seed).permutation(len(source))[:num]
    mesh = sharding.make_mesh()
    parts = sharding.batch_shards(mesh)
    batch_size = -(-min(batch_size, num) // parts) * parts
    values, used, done = np.zeros((draws, num)), np.zeros((draws, num)), 0
    for start in range(0, num, batch_size):
        # The last call is filled up with images that do not count: one shape, one program.
        rows = np.minimum(np.arange(start, start + batch_size), num - 1)
        x0, cond = _inputs(model, source.batch(chosen[rows]))
        inputs = jax.device_put((rows.astype(np.int32), x0, cond), sharding.batch_sharding(mesh))
        here = slice(start, min(start + batch_size, num))
        for draw in range(draws):
            key = jax.random.fold_in(jax.random.key(seed), draw)
            out = program(model.params, solver, key, *inputs)
            value, evaluations = generating.gather(out)
            values[draw, here], used[draw, here] = (v[: here.stop - start] for v in (value, evaluations))
            done += here.stop - start
            progress(done, num * draws)
    return _summary(values, used, unit)


def _run(of, process, apply, params, solver, key, indices, x0, cond):
    denoise = guidance.condition(guidance.model_denoiser(process, apply, params), cond)
    return of(denoise, solver, key, indices, x0)


def _inputs(model: Model, batch: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Images as floats, and what the network is conditioned on."""
    cond = {}
    if model.network.num_classes:
        cond["label"] = batch["label"]
    if model.condition is not None:
        cond["image"] = model.condition_images(batch["image"])
    return np.asarray(to_float(jnp.asarray(batch["image"]))), cond


def _summary(values: np.ndarray, used: np.ndarray, unit: str) -> Measured:
    """values, used: [draws, images]."""
    finished = np.all(np.isfinite(values), axis=0)
    kept = values[:, finished]
    draws, images = kept.shape
    if images < 2:
        raise UserError("the ODE solver gave up on nearly every image: is this model trained?")
    stderr = np.std(kept.mean(0), ddof=1) / math.sqrt(images)
    of_draws = math.sqrt(np.mean(np.var(kept, axis=0, ddof=1)) / (draws * images)) if draws > 1 else None
    failed = int(np.sum(~finished))
    return Measured(float(kept.mean()), float(stderr), of_draws, images, failed, unit, float(used.mean()))
