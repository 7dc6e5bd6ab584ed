"""The training step: a pure function (state, batch) -> (state, metrics), compiled once.

    t, w ~ times;  x_t, target = q_sample(x_0, t);  L = mean w |F(x_t, t, c) - target|^2;  AdamW;  EMA;  projection.

A network with a log-variance u is trained on mean w (L / exp(u) + u) (models/uncertainty.py); the loss that is
reported stays L. A network with a projection (EDM2's forced weight normalisation) has it applied last, which is before
the next step's forward pass, where the original does it; the averages are of the weights before it, as there.

A loss or gradient that is not finite changes nothing but the step and its counters (guard.py).

All randomness comes from fold_in(root, step + shift), so step n of a run is the same however it was reached; the shift
is 0 until a rollback (rollback.py).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.experimental.layout import Layout, with_layout_constraint

from jax_diffusion import lowering, sharding
from jax_diffusion.conditions import Condition
from jax_diffusion.data import augment
from jax_diffusion.models import Network
from jax_diffusion.process import Gaussian
from jax_diffusion.train import ema as ema_lib
from jax_diffusion.train import guard, metrics
from jax_diffusion.train.state import TrainState

# Of jax.random. Threefry's numbers are the same on every platform, mesh and version; the others are XLA's own
# RngBitGenerator (unsafe_rbg splits keys with it too), which is faster and promises none of that.
GENERATORS = ("threefry2x32", "rbg", "unsafe_rbg")

Batch = dict[str, jax.Array]  # "image" [B, H, W, C] uint8 or float, "label" [B] int32, "cond_image" [B, ...]


def drop_labels(key: jax.Array, label: jax.Array, null: int, rate: float) -> jax.Array:
    """Replaces each label by `null` with probability `rate` (Ho & Salimans 2022, algorithm 1). [B] -> [B]."""
    return jnp.where(jax.random.bernoulli(key, rate, label.shape), null, label)


def conditions(
    batch: Batch, x0: jax.Array, num_classes: int, condition: Condition | None = None
) -> dict[str, jax.Array]:
    """What the network is conditioned on: of all a batch holds, and what `condition` takes from the clean x0."""
    cond = {}
    if num_classes:
        cond["label"] = batch["label"]
    if "cond_image" in batch:
        cond["image"] = augment.to_float(batch["cond_image"])
    if condition is not None:
        cond["image"] = condition.apply(x0)
    return cond


def losses_of(network: Network, process: Gaussian, params, x_t, target, t, cond, key=None) -> jax.Array:
    """The process's loss of the network's prediction, [B]; with a key, dropout is on."""
    inputs, c_noise = process.network_inputs(x_t, t)
    return process.loss(network.apply(params, inputs, c_noise, cond, key=key), target, x_t, t)


def noise_level(process: Gaussian, t: jax.Array) -> jax.Array:
    """log(sigma / alpha) / 4 of any process's times, EDM's c_noise: what a network's log_variance is a function of."""
    return jnp.clip(-process.schedule.log_snr(t) / 8, -5.0, 5.0)


def _row_major(grads: Any) -> Any:
    """Gradients laid out as parameters are. cuDNN's of convolutions are not, and XLA would carry their layout through
    the optimizer and the EMA, each of which then copies itself back (counted in the HLO: 117 copies, now 21). On one
    device alone: the partitioner would gather every gradient for it."""

    def pin(g):
        return with_layout_constraint(g, Layout(tuple(range(g.ndim)))) if g.ndim > 2 else g

    return jax.tree.map(pin, grads)


class Drawn(NamedTuple):
    """All that a step has drawn for its batch."""

    x_t: jax.Array  # [B, ...]
    target: jax.Array  # [B, ...]
    t: jax.Array  # [B]
    weight: jax.Array  # [B]
    cond: dict[str, jax.Array]
    dropout: jax.Array  # a key


def microbatches(drawn: Drawn, parts: int) -> Drawn:
    """[B, ...] -> [parts, B/parts, ...] by strides, so that no sample changes its device; a key for each part."""
    *arrays, key = drawn

    def cut(x):
        return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    return Drawn._make([*jax.tree.map(cut, arrays), jax.random.split(key, parts)])


class Objective(NamedTuple):
    """The part of a step before the optimizer, which diagnosis.py takes apart."""

    network: Network
    process: Gaussian
    draw: Callable[[TrainState, Batch], Drawn]
    gradients: Callable[[Any, Drawn], tuple[jax.Array, jax.Array, Any]]  # of params: objective [], losses [B], grads
    accumulate: int


def make_objective(
    network: Network,
    process: Gaussian,
    times,
    *,
    seed: int,
    rng: str = "threefry2x32",  # of GENERATORS
    condition: Condition | None = None,
    flip: bool = False,
    label_dropout: float = 0.0,
    accumulate: int = 1,
) -> Objective:
    """Times and noise are drawn for the whole batch before it is cut into `accumulate` microbatches, so accumulation
    changes the memory and not the mathematics."""

    def draw(state: TrainState, batch: Batch) -> Drawn:
        # The stream starts at the seed; init uses the seed's own key, hence the fold by 1 more.
        key = jax.random.fold_in(jax.random.key(seed, impl=rng), state.step + state.faults["shift"] + 1)
        k_flip, k_time, k_noise, k_label, k_dropout = jax.random.split(key, 5)
        x0 = augment.to_float(batch["image"])
        if flip:
            x0 = augment.random_flip(k_flip, x0)
        t, weight = times.sample(state.timesteps, k_time, x0.shape[0], process.schedule)
        x_t, target = process.q_sample(k_noise, x0, t)
        cond = conditions(batch, x0, network.num_classes, condition)
        if label_dropout and "label" in cond:
            cond["label"] = drop_labels(k_label, cond["label"], network.num_classes, label_dropout)
        return Drawn(x_t, target, t, weight, cond, k_dropout)

    def loss_fn(params, x_t, target, t, weight, cond, key):
        losses = losses_of(network, process, params, x_t, target, t, cond, key)
        if network.log_variance is None:
            return jnp.mean(weight * losses), losses
        u = network.log_variance(params, noise_level(process, t))
        return jnp.mean(weight * (losses / jnp.exp(u) + u)), losses

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def gradients(params, drawn: Drawn):
        if accumulate == 1:
            (loss, losses), grads = grad_fn(params, *drawn)
            return loss, losses, grads

        def body(total, micro):
            (loss, losses), grads = grad_fn(params, *micro)
            return jax.tree.map(jnp.add, total, (loss, grads)), losses

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        (loss, grads), losses = jax.lax.scan(body, zero, microbatches(drawn, accumulate))
        loss, grads = jax.tree.map(lambda v: v / accumulate, (loss, grads))
        return loss, losses.swapaxes(0, 1).reshape(-1), grads

    return Objective(network, process, draw, gradients, accumulate)


def make_train_step(
    network: Network,
    process: Gaussian,
    times,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float = 0.9999,
    ema_warmup: bool = True,
    ema_profiles: tuple[float, ...] = (),
    spike: float = 0.0,  # guard.judge
    one_device: bool = False,  # the step will run on one: then a gradient may be given a layout
    **options: Any,  # of make_objective: seed, ...
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """One optimizer step, or none where the guard says so. The metrics: loss, grad_norm and, where it is not the loss,
    objective, all as they came; by_time (metrics.loss_by_time); and of the faults so far skipped, spikes, in_a_row."""
    gammas = tuple(map(ema_lib.gamma_of, ema_profiles))
    objective = make_objective(network, process, times, **options)

    def step(state: TrainState, batch: Batch):
        drawn = objective.draw(state, batch)
        loss, losses, grads = objective.gradients(state.params, drawn)
        if one_device:
            grads = jax.lax.platform_dependent(grads, cuda=_row_major, default=lambda g: g)
        said = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        if network.log_variance is not None:
            said |= {"loss": jnp.mean(drawn.weight * losses), "objective": loss}
        good, faults = guard.judge(state.faults, said["loss"], said["grad_norm"], spike)

        # Chosen before the EMA sees them, which then needs no choice of its own: XLA's fusions of the optimizer break
        # where every one of its outputs is chosen at the end (docs/benchmarks.md).
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        updated = guard.keep(good, optax.apply_updates(state.params, updates), state.params)
        decay = jnp.where(good, ema_lib.decay_at(state.step, ema_decay, ema_warmup), 1.0)
        timesteps = times.update(state.timesteps, drawn.t, losses, process.schedule)
        averages = ema_lib.update_powers(state.averages, updated, state.step, gammas)
        new = TrainState(
            step=state.step + 1,
            params=updated if network.project is None else guard.keep(good, network.project(updated), state.params),
            opt_state=guard.keep(good, opt_state, state.opt_state),
            ema=ema_lib.update(state.ema, updated, decay),
            timesteps=guard.keep(good, timesteps, state.timesteps),
            averages=guard.keep(good, averages, state.averages),
            faults=faults,
        )
        said["by_time"] = metrics.loss_by_time(process.schedule, drawn.t, losses)
        return new, said | {k: faults[k] for k in ("skipped", "spikes", "in_a_row")}

    return step


def several(step: Callable) -> Callable:
    """K training steps in one dispatch: batches [K, B, ...], and each of the metrics [K, ...]."""

    def run(state, batches):
        return jax.lax.scan(step, state, batches)

    return run


def compile_step(step: Callable, shardings: TrainState, mesh, leading: int = 0):
    """The jitted step: the state donated and kept in its shards, the batch split, metrics replicated."""
    return lowering.jit(
        step,
        mesh.devices.flat[0].platform,
        in_shardings=(shardings, sharding.batch_sharding(mesh, leading)),
        out_shardings=(shardings, sharding.replicated(mesh)),
        donate_argnums=(0,),
    )


def make_eval_step(network: Network, process: Gaussian, times, *, seed: int, condition: Condition | None = None):
    """`eval_step(params, batch, i) -> loss []`: the loss of batch i with times and noise that never change."""

    def eval_step(params, batch, i):
        key = jax.random.fold_in(jax.random.key(seed), i)
        k_time, k_noise = jax.random.split(key)
        x0 = augment.to_float(batch["image"])
        t, weight = times.sample(times.init(process.schedule), k_time, x0.shape[0], process.schedule)
        x_t, target = process.q_sample(k_noise, x0, t)
        cond = conditions(batch, x0, network.num_classes, condition)
        return jnp.mean(weight * losses_of(network, process, params, x_t, target, t, cond))

    return eval_step
