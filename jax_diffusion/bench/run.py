"""The comparison: for each case and mode both frameworks are started, checked against each other, and timed in turn.

    for each case and mode:
      two workers, fresh ones on accelerators; JAX's leaves its network and weights for PyTorch's
      equality of outputs (and of the loss), else an error
      for each batch, for each variant of PyTorch:  JAX, PyTorch, PyTorch, JAX, ... round by round

Every variant of PyTorch has rounds of JAX beside it, and is let go of before the next one: networks that fill a GPU
can be compared in all of them.
"""

import os
import pathlib
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from jax_diffusion.bench import cases, machine, measure, report
from jax_diffusion.bench.settings import PACES, QUICK_VARIANTS, Options, default_cases
from jax_diffusion.bench.worker import Died, Failed, Worker
from jax_diffusion.errors import UserError
from jax_diffusion.train.report import duration
from jax_diffusion.version import __version__

CHECKED = 2  # images of the first comparison
CHECKED_VARIANTS = ("default", "xla")  # of JAX; the others are the same operations


class Bench:
    """One run. `result` is complete at any time: what was measured so far."""

    def __init__(
        self, options: Options, folder: pathlib.Path, log: Callable[[str], None], save: Callable[[dict], None]
    ):
        self.platform = ""  # known when JAX's worker has started
        self.o, self.folder, self.log, self.save = options, folder, log, save
        self.threads = options.threads or machine.cores()
        ours, theirs = options.sides
        # Two processes share an accelerator: neither may take all of its memory at the start.
        shared = {} if options.only else {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        self.workers = {"jax": Worker(ours, folder, self.threads, shared)}
        if options.xla_flags:
            flags = f"{os.environ.get('XLA_FLAGS', '')} {options.xla_flags}".strip()
            self.workers["jax_flags"] = Worker(ours, folder, self.threads, {**shared, "XLA_FLAGS": flags})
        share = machine.free_share(self.threads)
        waiting = machine.torch_environment(share)
        if not options.only:
            self.workers["torch"] = Worker(theirs, folder, self.threads, waiting)
        self.result: dict[str, Any] = {
            "settings": {**options._asdict(), "threads": self.threads, "torch_environment": waiting},
            "machine": machine.describe(),
            "versions": {"jax_diffusion": __version__},
            "ceilings": {},
            "checks": [],
            "failures": [],
            "phases": [],
            "rows": [],
            "complete": False,
        }
        self.result["machine"]["free_share_before"] = share
        if share < machine.BUSY:
            self.log(f"note: other work takes {100 * (1 - share):.0f} % of the {self.threads} cores: repeat this on a "
                     "machine that is idle")  # fmt: skip

    def run(self) -> dict[str, Any]:
        """Everything. Raises UserError where outputs differ or something is asked for that is not there."""
        try:
            try:
                self._open(("jax",))
            except (Died, Failed) as e:
                raise UserError(str(e)) from None
            self._plan()
            started, total = time.monotonic(), len(self.plan)
            for done, (case, mode) in enumerate(self.plan):
                left = (time.monotonic() - started) / done * (total - done) if done else None
                about = f", about {duration(left)} left" if left else ""
                self.log(f"[{done + 1}/{total}{about}] {case} {mode}: {cases.CASES[case].about}")
                try:
                    self._one(case, mode)
                except (Died, Failed) as e:
                    self._fail(case, mode, str(e))
            self.result["complete"] = not self.result["failures"]
            return self.result
        finally:
            for worker in self.workers.values():
                worker.stop()
            self.result["machine"]["free_share_after"] = machine.free_share(self.threads)
            self._save()

    def _open(self, names: Iterable[str]) -> None:
        """Fresh workers, the first of each kind told to say what it is."""
        for name in names:
            worker = self.workers[name]
            worker.stop()
            ours = {"compile_cache": self.o.compile_cache, "onednn": self.o.onednn}
            more = {"platform": self.platform} if name == "torch" else ours
            said = worker.call("start", **more)
            self.result["versions"] |= said.pop("versions", {})
            self.result["machine"].setdefault(name, said)
            if name == "jax":
                self.platform, self.memory = said["platform"], said["memory"]

    def _plan(self) -> None:
        """What is compared, once the device is known."""
        o, self.accelerator = self.o, self.platform != "cpu"
        pace = PACES["quick" if o.quick else "accelerator" if self.accelerator else "cpu"]
        self.pace = pace._replace(rounds=o.rounds or pace.rounds, steps=o.steps or pace.steps,
                                  seconds=1e9 if o.steps else pace.seconds)  # fmt: skip
        self.dtype = o.dtype or ("bfloat16" if self.accelerator else "float32")
        names = o.cases or (default_cases(self.memory) if self.accelerator and not o.quick else ("unet_half",))
        self.plan = [(case, mode) for case in names for mode in o.modes]
        self.result["settings"] |= {"pace": self.pace._asdict(), "dtype": self.dtype, "cases": list(names)}

    def _batches(self, case: str, mode: str) -> list[int]:
        if self.o.batches:
            return list(self.o.batches)
        if self.o.quick:
            return [1] if mode == "sample" else [4]
        return list(cases.default_batches(case, mode, self.accelerator))

    def _one(self, case: str, mode: str) -> None:
        """One case in one mode, at all batches."""
        batches = self._batches(case, mode)
        work = cases.Work(case, mode, batches[0], self.dtype, self.o.sampler_steps, self.o.overrides)
        # On accelerators fresh ones: what JAX has taken of the memory it does not give back.
        self._open(n for n, worker in self.workers.items() if self.accelerator or worker.process is None)
        self._ceilings()
        size = self.workers["jax"].call("load", **work._asdict())["parameters"]
        if "jax_flags" in self.workers:
            self.workers["jax_flags"].call("load", **work._asdict())
        if "torch" in self.workers:
            self.workers["jax"].call("export")
            theirs = self.workers["torch"].call("load", **work._asdict())["parameters"]
            if theirs != size:
                raise UserError(f"{case}: {size:,} parameters in JAX and {theirs:,} in PyTorch: nothing was timed")
            if mode != "forward":
                theirs = self.workers["torch"].call("check", batch=CHECKED)
                for variant in self._our_variants("jax", mode):
                    if variant in CHECKED_VARIANTS:
                        ours = self.workers["jax"].call("check", batch=CHECKED, variant=variant)
                        self._compare(work, ours, theirs, "" if variant == "default" else variant)
        for batch in batches:
            self._batch(work._replace(batch=batch))

    def _ceilings(self) -> None:
        """Once: what a matrix product reaches in each framework."""
        if self.result["ceilings"]:
            return
        arguments = {"size": self.pace.ceiling_size, "dtype": self.dtype, "seconds": self.pace.ceiling_seconds}
        self.result["ceilings"] = {n: self.workers[n].call("ceiling", **arguments) for n in self.workers}

    def _compare(self, w: cases.Work, ours: str, theirs: str, variant: str = "") -> None:
        """Raises UserError where two files of outputs differ by more than rounding."""
        limit = cases.tolerance(w.dtype, self.platform, w.mode)
        with np.load(ours) as a, np.load(theirs) as b:
            found = {name: cases.distance(b[name], a[name]) for name in ("output", "loss") if name in a}
        self.result["checks"].append({"case": w.case, "mode": w.mode, "batch": w.batch, "variant": variant,
                                      "relative_distance": found, "tolerance": limit})  # fmt: skip
        said = ", ".join(f"{name} {value:.1e}" for name, value in found.items())
        if not max(found.values()) <= limit:
            raise UserError(
                f"{w.case} {w.mode}{f' ({variant})' if variant else ''}: JAX and PyTorch differ (relative distance: "
                f"{said}; at most {limit:.0e} is rounding): nothing of it was timed"
            )
        self.log(f"  same{f' ({variant}, batch {w.batch})' if variant else ''}: relative distance {said}, "
                 f"tolerance {limit:.0e}")  # fmt: skip

    def _batch(self, w: cases.Work) -> None:
        """Every variant at one batch."""
        ours = {}
        for name in [n for n in self.workers if n != "torch"]:
            for variant in self._our_variants(name, w.mode):
                label = variant if name == "jax" else f"{variant}+flags"
                ready = self._prepare(w, name, variant, label)
                if ready:
                    ours[label] = (name, ready)
        theirs = self._their_variants(w.mode) if "torch" in self.workers else [""]
        for variant in theirs:
            contenders = dict(ours)
            if variant:
                ready = self._prepare(w, "torch", variant, variant)
                if not ready:
                    continue
                contenders[variant] = ("torch", ready)
                if w.mode != "train" and "default" in ours:
                    self._compare_outputs(w, variant)
            self._phase(w, contenders, variant)
            if variant and self.workers["torch"].process is not None:
                self.workers["torch"].call("drop", key=variant)
        for label, (name, _) in ours.items():
            self.workers[name].call("drop", key=label)

    def _our_variants(self, name: str, mode: str) -> list[str]:
        known = self.workers[name].call("variants", mode=mode)
        return [v for v in known if v != "xla" or not self.o.quick]

    def _their_variants(self, mode: str) -> list[str]:
        known = self.workers["torch"].call("variants", mode=mode)
        wanted = self.o.variants or (QUICK_VARIANTS if self.o.quick else known)
        return [v for v in known if v in wanted] or [""]

    def _compare_outputs(self, w: cases.Work, variant: str) -> None:
        """Of what is about to be timed. Samples begin with the noise that JAX's began with."""
        ours = self.workers["jax"].call("output", key="default")
        begin = {"begin": ours} if w.mode == "sample" else {}
        self._compare(w, ours, self.workers["torch"].call("output", key=variant, **begin), variant)

    def _prepare(self, w: cases.Work, name: str, variant: str, label: str) -> dict[str, Any] | None:
        """Compiled and warm; None, and a row that says why, where that fails."""
        started = time.monotonic()
        whose = f"  batch {w.batch}: {'torch' if name == 'torch' else 'jax'} {label}"
        self.log(f"{whose}: compiling and warming up")
        try:
            ready = self.workers[name].call(
                "prepare", key=label, mode=w.mode, variant=variant, batch=w.batch, warmup=self.pace.warmup
            )
        except (Failed, Died) as e:
            self._failed_row(w, name, label, e)
            return None
        self.log(f"{whose}: ready in {time.monotonic() - started:.0f} s")
        return ready

    def _failed_row(self, w: cases.Work, name: str, label: str, error: Exception) -> None:
        self.log(f"  batch {w.batch}: {name} {label} failed: {error}")
        self.result["phases"].append({**_key(w), "failed": {"framework": name, "variant": label, "why": str(error)}})
        self._save()
        if isinstance(error, Died):
            self.result["failures"].append(f"{w.case} {w.mode}: {error}")
            if name != "torch":
                raise error
            self._open(("torch",))
            self.workers["torch"].call("load", **w._asdict())
        elif name == "torch":
            self.workers["torch"].call("drop", key=label)

    def _phase(self, w: cases.Work, contenders: dict[str, tuple[str, dict]], theirs: str) -> None:
        """The rounds of some contenders, in turn."""
        if not contenders:
            return
        ready = [r for _, r in contenders.values()]
        steps = measure.steps_a_round([r["step_s"] for r in ready], self.pace.steps, self.pace.seconds,
                                      [r["per_call"] for r in ready])  # fmt: skip
        involved = {name for name, _ in contenders.values()}
        times: dict[str, list[float]] = {label: [] for label in contenders}
        peaks: dict[str, int] = {}
        running = ""

        def run(label: str) -> float:
            nonlocal running
            running = label
            return self.workers[contenders[label][0]].call("run", key=label, steps=steps)

        try:
            for name in involved:
                self.workers[name].call("restart_peak")
            # As a round is, and not counted: steps that are queued hold memory each, which must have been touched.
            for label in contenders:
                run(label)
            measure.interleave(list(contenders), self.pace.rounds, run, lambda n, s: times[n].append(s / steps))
            for name in involved:
                peaks[name] = self.workers[name].call("peak")
        except (Failed, Died) as e:
            self._record(w, steps, theirs, contenders, times, peaks)
            self._failed_row(w, contenders[running][0], running, e)
        except KeyboardInterrupt:
            self._record(w, steps, theirs, contenders, times, peaks)
            raise
        else:
            self._record(w, steps, theirs, contenders, times, peaks)
            self.log("  " + report.phase_line(self.result["phases"][-1]))

    def _record(self, w: cases.Work, steps: int, theirs: str, contenders, times, peaks) -> None:
        """Keeps the rounds of a phase, as many as there are."""
        entries = {
            label: {
                "framework": "torch" if name == "torch" else "jax",
                **ready,
                "step_s": times[label],
                "peak_memory": peaks.get(name, 0),
            }
            for label, (name, ready) in contenders.items()
            if times[label]
        }
        if entries:
            self.result["phases"].append({**_key(w), "steps": steps, "theirs": theirs, "entries": entries})
            self._save()

    def _fail(self, case: str, mode: str, why: str) -> None:
        if not any(why in said for said in self.result["failures"]):
            self.result["failures"].append(f"{case} {mode}: {why}")
        self.log(f"  {case} {mode} ended early: {why}")

    def _save(self) -> None:
        self.result["rows"] = report.rows(self.result)
        self.save(self.result)


def _key(w: cases.Work) -> dict[str, Any]:
    return {"case": w.case, "mode": w.mode, "batch": w.batch}
