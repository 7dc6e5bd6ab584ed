"""The training run, top to bottom: data, model, shards, step, loop.

The run is a function of (config, step): data order, times, noise and dropout at step n depend on n alone, so a
resumed run repeats the uninterrupted one bit for bit.
"""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jax_diffusion import config as configs
from jax_diffusion import experiment, onednn, processes, runtime, sharding
from jax_diffusion.data import Batches, resident
from jax_diffusion.train import (
    checkpoint,
    environment,
    events,
    flops,
    journal,
    loggers,
    metrics,
    posthoc,
    profiling,
    setup,
    state,
)
from jax_diffusion.train.interrupt import Interrupt
from jax_diffusion.train.observe import Artist, Validator
from jax_diffusion.train.report import Meter, count, duration
from jax_diffusion.train.rollback import Rollback
from jax_diffusion.train.watchdog import Watchdog
from jax_diffusion.train.workdir import Lock
from jax_diffusion.train.writers import MetricWriter


class Outcome(NamedTuple):
    """How a run ended."""

    step: int
    state: state.TrainState
    val_loss: float | None
    finished: bool  # False: stopped before train.steps, to be resumed
    stopped_by: str = ""  # "SIGINT", "SIGTERM"


def _start(s: setup.Setup, checkpoints: checkpoint.Checkpointer, newest: int | None, log):
    """The state to start from and its shardings: made in its shards, or restored into them."""
    key = jax.random.fold_in(jax.random.key(s.config.seed), 0)
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
    restored = checkpoints.restore(wanted, newest)
    log(f"resuming {s.workdir} at step {int(restored.step):,} of {s.config.train.steps:,}")
    return restored, shardings


def _compiler(s: setup.Setup, log):
    """`compiled(k)`: the program for k steps in one dispatch, and the work of one step."""
    t, cache = s.config.train, {}
    if jax.default_backend() == "cpu" and (t.steps_per_dispatch > 1 or t.accumulate > 1) and len(s.shape) == 3:
        # Measured: docs/benchmarks.md.
        log("note: on CPUs XLA runs the gradients of convolutions inside a loop 12 to 20 times slower; use "
            "--config.train.steps_per_dispatch=1 --config.train.accumulate=1")  # fmt: skip
    if onednn.advice() and len(s.shape) == 3:
        log(f"note: without oneDNN, which trains faster on this processor: {onednn.advice()}")

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


def _feed(s: setup.Setup, end: int, log):
    """`feed(now, shift)`: the batches of the steps from `now` to `end`, `shift` ahead in the data."""
    t, data = s.config.train, s.config.data
    place = sharding.batch_sharding(s.mesh, leading=int(t.steps_per_dispatch > 1))
    resides = resident.load(s.source, data.on_device, place, log)

    def feed(now: int, shift: int) -> Batches:
        return Batches(
            s.source, t.batch_size, s.config.seed, now + shift,
            steps_per_dispatch=t.steps_per_dispatch, sharding=place, stop_step=end + shift,
            prefetch_bytes=data.prefetch_bytes, resident=resides,
        )  # fmt: skip

    return feed


def _peak(s: setup.Setup, measure: bool, log) -> float | None:
    """FLOP/s that all devices can do at most, which the MFU is a share of; None where neither known nor measured."""
    devices, dtype = s.mesh.devices.size, s.config.model.get("dtype", "float32")
    if measure:
        here = flops.measured_peak(dtype) * devices
        log(f"measured: matmuls of {dtype} at {count(here, 'FLOP/s')} on {devices} device(s), of which MFU is a share")
        return here
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
    log = journal.keep_warnings(workdir, log)
    s = setup.prepare(setup.settle_config(config, workdir), workdir)
    t = s.config.train
    log(setup.describe(s))
    if note := s.program.replication_note():
        log(note)

    opened = contextlib.ExitStack()
    with (
        Lock(workdir, log),
        checkpoint.Checkpointer(workdir, t.keep, log) as checkpoints,
        Interrupt() as interrupt,
        opened,
    ):
        found = checkpoints.newest(lambda step: _start(s, checkpoints, step, log))
        train_state, shardings = found or _start(s, checkpoints, None, log)
        setup.write_facts(s)  # nothing is written before the checkpoint is known to fit
        now, shift = int(train_state.step), int(train_state.faults["shift"])
        end = min(t.steps, stop_at or t.steps)
        others = loggers.start(s.config, workdir, log) if now < end else ()
        writer = MetricWriter(workdir, active=jax.process_index() == 0, start=now, loggers=others)
        saved, val_loss, began = now, None, time.perf_counter()
        tracer = profiling.Profile(profile, now, end, workdir / "profile", log)
        if now < end:
            environment.record(workdir, s.mesh, now)
            compiled = _compiler(s, log)
            validate: Any = Validator(s, shardings) if t.eval_every and s.held_out is not None else None
            draw = Artist(s, writer)
            feed = _feed(s, end, log)
            batches = opened.enter_context(feed(now, shift))
            _, work = compiled(min(t.steps_per_dispatch, end - now))
            meter = Meter(t.steps, t.batch_size, work.model, _peak(s, measure_peak, log))
            # Queued behind the steps and fetched with their metrics: nothing in the loop waits for the devices.
            vitals = s.program.vitals()
            rollback = Rollback(s, checkpoints, writer, lambda step: _start(s, checkpoints, step, log)[0], log)

            def record(close, now):
                extra = vitals(train_state) | metrics.memory(jax.local_devices()) | {"input_wait": batches.wait_share}
                for r in close(now, extra):
                    writer.write_scalars(r.step, r.scalars)
                    log(r.line)
                    rollback.look(r)

            with Watchdog(t.stall_seconds, log) as watchdog, tracer, processes.watched(workdir):
                tracer.turn(now)
                meter.restart_clock()
                while True:
                    with watchdog.watching("input", now):
                        _, batch = next(batches)
                    k = min(t.steps_per_dispatch, end - now)
                    run = compiled(k)[0]
                    with watchdog.watching("step", now):
                        with profiling.step(now):
                            train_state, said = run(train_state, batch)
                        meter.add(k, said)
                        before, now = now, now + k
                        stops = now >= end or bool(interrupt.asked())
                        due = events.after(s.config, before, now, stops, validate is not None, tracer.due(now))
                        if due.logs:
                            record(meter.flush if due.pauses else meter.roll, now)
                    if rollback.due:
                        train_state = rollback(train_state, now)
                        now, shift = int(train_state.step), int(train_state.faults["shift"])
                        saved = now
                        batches.close()
                        batches = opened.enter_context(feed(now, shift))
                        meter.forget()
                        continue
                    if due.pauses:
                        tracer.turn(now)
                        if due.evaluates:
                            val_loss = validate(train_state.ema)
                            writer.write_scalars(now, {"val_loss": val_loss})
                            log(f"step {now:,}: validation loss {val_loss:.4f} (EMA weights, held-out data)")
                        if due.draws:
                            draw(now, train_state.ema)
                        if due.keeps:
                            posthoc.save_snapshots(workdir, now, train_state.averages, s.config.ema)
                        if due.saves and rollback.may_save(now):
                            writer.flush()  # what was measured until here, before the checkpoint counts
                            checkpoints.save(train_state, val_loss if due.evaluates else None)
                            saved = now
                        meter.restart_clock()
                    if due.stops:
                        break
        writer.close()
    if now < t.steps:
        why = f"stopped ({interrupt.requested})" if interrupt.requested else "stopped"
        where = f"and saved at step {now:,}" if saved == now else f"at step {now:,}, saved at step {saved:,}"
        log(f"{why} {where}; resume: jax-diffusion train --workdir={workdir}")
    else:
        log(f"done: {now:,} steps in {duration(time.perf_counter() - began)}; weights in {workdir}/checkpoints")
    return Outcome(now, train_state, val_loss, now >= t.steps, interrupt.requested)
