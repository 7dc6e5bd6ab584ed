"""The training run, top to bottom: data, model, shards, step, loop.

The run is a function of (config, step): data order, times, noise and dropout at step n depend on n alone, so a
resumed run repeats the uninterrupted one bit for bit.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from jax_diffusion import config as configs
from jax_diffusion import experiment, runtime, sharding
from jax_diffusion.data import Batches
from jax_diffusion.train import checkpoint, flops, posthoc, profiling, setup, state
from jax_diffusion.train.interrupt import Interrupt
from jax_diffusion.train.observe import Artist, Validator
from jax_diffusion.train.report import Meter, count, duration
from jax_diffusion.train.writers import MetricWriter


class Outcome(NamedTuple):
    """How a run ended."""

    step: int
    state: state.TrainState
    val_loss: float | None
    finished: bool  # False: stopped before train.steps, to be resumed


def due(every: int, before: int, now: int) -> bool:
    """Whether a multiple of `every` (0: never) lies in (before, now]."""
    return every > 0 and now // every > before // every


def _start(s: setup.Setup, checkpoints: checkpoint.Checkpointer, log):
    """The state to start from and its shardings: made in its shards, or restored into them."""
    key = jax.random.fold_in(jax.random.key(s.config.seed), 0)
    newest = checkpoints.latest()
    if newest is None:
        return s.program.create(key)
    if checkpoints.holds_weights_alone(newest):
        fresh, shardings = s.program.create(key)
        wanted = sharding.abstract(fresh.params, shardings.params)
        params, ema = (checkpoints.restore_weights(wanted, newest, ema=ema) for ema in (False, True))
        if s.parts.network.project is not None:
            params = jax.jit(s.parts.network.project, out_shardings=shardings.params)(params)
        log(f"starting from the weights in {s.workdir}")
        return dataclasses.replace(fresh, params=params, ema=ema), shardings
    wanted, shardings = s.program.abstract_state()
    restored = checkpoints.restore(wanted)
    log(f"resuming {s.workdir} at step {int(restored.step):,} of {s.config.train.steps:,}")
    return restored, shardings


def _compiler(s: setup.Setup, log):
    """`compiled(k)`: the program for k steps in one dispatch, and the work of one step."""
    t, cache = s.config.train, {}
    if jax.default_backend() == "cpu" and (t.steps_per_dispatch > 1 or t.accumulate > 1) and len(s.shape) == 3:
        # Measured: docs/benchmarks.md.
        log("note: on CPUs XLA runs the gradients of convolutions inside a loop 12 to 20 times slower; use "
            "--config.train.steps_per_dispatch=1 --config.train.accumulate=1")  # fmt: skip

    def compiled(k: int):
        if k not in cache:
            kept = jax.config.jax_enable_compilation_cache and jax.config.jax_compilation_cache_dir
            log("compiling the training step: seconds to minutes, by the size of the network; "
                + (f"kept in {kept}" if kept else "not kept for the next start"))  # fmt: skip
            started, before = time.perf_counter(), runtime.compiled()
            batch = experiment.abstract_batch(s.source, t.batch_size)
            traced = s.program.trace(batch, steps=k)
            work = flops.of_step(s.program, traced, batch, k)
            cache[k] = traced.lower().compile(), work
            how = "read from there" if (runtime.compiled() - before).read else "compiled"
            again = f" ({count(work.hardware / t.batch_size)} with remat)" if work.hardware > work.model else ""
            log(f"{how} in {time.perf_counter() - started:.1f} s, {count(work.model / t.batch_size, 'FLOP')} an image"
                + again)  # fmt: skip
        return cache[k]

    return compiled


def _peak(s: setup.Setup, measure: bool, log) -> float | None:
    """FLOP/s that all devices can do at most, which the MFU is a share of; None where neither known nor measured."""
    devices, dtype = s.mesh.devices.size, s.config.model.get("dtype", "float32")
    if measure:
        peak = flops.measured_peak(dtype) * devices
        log(f"measured: matmuls of {dtype} at {count(peak, 'FLOP/s')} on {devices} device(s), of which MFU is a share")
        return peak
    kind = s.mesh.devices.flat[0].device_kind
    peak = flops.peak(kind, dtype, jax.config.jax_default_matmul_precision)
    return None if peak is None else peak * devices


def train(
    config: configs.ConfigDict | None,
    workdir: str | pathlib.Path,
    *,
    stop_at: int | None = None,
    profile: str | None = None,
    measure_peak: bool = False,
    log: Callable[[str], None] = print,
) -> Outcome:
    """Trains until config.train.steps, or `stop_at`, or Ctrl-C; resumes what `workdir` holds.

    config: None resumes with the workdir's own.  log: called with each line meant for the user.
    profile: "START:STOP", the steps to trace (profiling.Profile).
    measure_peak: the MFU is of matmuls timed here, instead of the chip's data sheet.
    Raises UserError for whatever the user can mend.
    """
    workdir = pathlib.Path(workdir)
    s = setup.prepare(setup.settle_config(config, workdir), workdir)
    t = s.config.train
    workdir.mkdir(parents=True, exist_ok=True)
    setup.write_facts(s)
    log(setup.describe(s))
    writer = MetricWriter(workdir, active=jax.process_index() == 0)

    with checkpoint.Checkpointer(workdir, t.keep) as checkpoints, Interrupt() as interrupt:
        train_state, shardings = _start(s, checkpoints, log)
        now = int(train_state.step)
        end = min(t.steps, stop_at or t.steps)
        val_loss, began = None, time.perf_counter()
        tracer = profiling.Profile(profile, now, end, workdir / "profile", log)
        if now < end:
            compiled = _compiler(s, log)
            validate = Validator(s, shardings) if t.eval_every and s.held_out is not None else None
            draw = Artist(s, writer)
            place = sharding.batch_sharding(s.mesh, leading=int(t.steps_per_dispatch > 1))
            batches = Batches(
                s.source, t.batch_size, s.config.seed, now,
                steps_per_dispatch=t.steps_per_dispatch, sharding=place, stop_step=end,
            )  # fmt: skip
            _, work = compiled(min(t.steps_per_dispatch, end - now))
            meter = Meter(t.steps, t.batch_size, work.model, _peak(s, measure_peak, log))
            # Queued behind the steps and fetched with their metrics: nothing in the loop waits for the devices.
            rate = jax.jit(s.program.learning_rate)

            def record(close, now):
                after = {"learning_rate": rate(jax.device_put(np.int32(now - 1)))}
                for r in close(now, input_wait=batches.wait_share, **after):
                    writer.write_scalars(r.step, r.scalars)
                    log(r.line)

            with batches, tracer:
                tracer.turn(now)
                meter.restart_clock()
                for _, batch in batches:
                    k = min(t.steps_per_dispatch, end - now)
                    run = compiled(k)[0]
                    with profiling.step(now):
                        train_state, metrics = run(train_state, batch)
                    meter.add(k, metrics)
                    before, now = now, now + k
                    last = now >= end or interrupt.requested
                    evaluates = validate and (due(t.eval_every, before, now) or now == t.steps)
                    draws = due(t.sample_every, before, now) or (t.sample_every and now == t.steps)
                    saves = due(t.checkpoint_every, before, now) or last
                    keeps = s.config.ema.profiles and (due(s.config.ema.snapshot_every, before, now) or now == t.steps)
                    pauses = evaluates or draws or saves or keeps or tracer.due(now)
                    if due(t.log_every, before, now) or pauses:
                        record(meter.flush if pauses else meter.roll, now)
                    if pauses:
                        tracer.turn(now)
                        if evaluates:
                            val_loss = validate(train_state.ema)
                            writer.write_scalars(now, {"val_loss": val_loss})
                            log(f"step {now:,}: validation loss {val_loss:.4f} (EMA weights, held-out data)")
                        if draws:
                            draw(now, train_state.ema)
                        if keeps:
                            posthoc.save_snapshots(workdir, now, train_state.averages, s.config.ema)
                        if saves:
                            checkpoints.save(train_state, val_loss if evaluates else None)
                        meter.restart_clock()
                    if last:
                        break
        writer.close()
    if now < t.steps:
        why = f"stopped ({interrupt.requested})" if interrupt.requested else "stopped"
        log(f"{why} and saved at step {now:,}; resume: jax-diffusion train --workdir={workdir}")
    else:
        log(f"done: {now:,} steps in {duration(time.perf_counter() - began)}; weights in {workdir}/checkpoints")
    return Outcome(now, train_state, val_loss, now >= t.steps)
