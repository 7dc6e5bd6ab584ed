"""What a workdir holds, read while it is written or after it was torn: what is missing is empty, never an error."""

import datetime
import json
import pathlib
from typing import Any, NamedTuple

import numpy as np

from jax_diffusion import config as configs
from jax_diffusion.errors import UserError
from jax_diffusion.reporting.series import Series, collect
from jax_diffusion.train import environment, journal
from jax_diffusion.train.writers import read_lines


class Mark(NamedTuple):
    """Something that happened at a step: a line in every curve."""

    kind: str  # "restart" or "rollback"
    step: int
    text: str


class Checkpoint(NamedTuple):
    """A folder of checkpoints/."""

    name: str
    step: int | None  # None of one that is not finished or was set aside
    bytes: int
    time: float


class Run(NamedTuple):
    """See `read`."""

    name: str
    workdir: pathlib.Path
    config: configs.ConfigDict | None
    facts: dict[str, Any]  # dataset.json
    starts: list[dict[str, Any]]  # environment.jsonl
    warnings: list[dict[str, Any]]  # warnings.jsonl
    series: dict[str, Series]
    clock: Series  # seconds since 1970 at which a step was last done
    marks: list[Mark]
    samples: list[tuple[int, pathlib.Path]]  # step, picture, ascending
    checkpoints: list[Checkpoint]
    evaluations: list[dict[str, Any]]  # evaluations.jsonl

    @property
    def steps(self) -> int | None:
        """That it is to do."""
        return None if self.config is None else self.config.train.steps

    @property
    def step(self) -> int | None:
        """The last that is known of."""
        last = [int(s.steps[-1]) for s in self.series.values()]
        return max(last) if last else None


def lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; lines that are none, and files that are not there, are left out."""
    out = []
    for line in _text(path).splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            out.append(record)
    return out


def _text(path: pathlib.Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _object(path: pathlib.Path) -> dict[str, Any]:
    try:
        found = json.loads(_text(path))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _config(path: pathlib.Path) -> configs.ConfigDict | None:
    try:
        return configs.from_json(path.read_text())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError):
        return None


def _marks(starts: list[dict], rollbacks: Series | None) -> list[Mark]:
    marks = [
        Mark("restart", s["step"], f"started again at step {s['step']:,}, {when(s.get('time'))}")
        for s in starts[1:]
        if isinstance(s.get("step"), int)
    ]
    if rollbacks is not None:
        made = np.concatenate([[0.0], rollbacks.values])
        for i in np.flatnonzero(np.diff(made) > 0).tolist():
            step = int(rollbacks.steps[i])
            marks.append(Mark("rollback", step, f"went back to a checkpoint before step {step:,}"))
    return sorted(marks, key=lambda m: m.step)


def when(seconds: Any) -> str:
    """Seconds since 1970 as "2026-11-21 09:30:05 UTC"; "?" for what is none."""
    try:
        return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (TypeError, ValueError, OSError, OverflowError):
        return "?"


def _samples(folder: pathlib.Path) -> list[tuple[int, pathlib.Path]]:
    found = [(p.stem.removeprefix("step_"), p) for p in folder.glob("step_*.png")]
    return sorted((int(step), p) for step, p in found if step.isdigit())


def _checkpoints(folder: pathlib.Path) -> list[Checkpoint]:
    out = []
    for path in folder.glob("*"):
        try:
            if not path.is_dir():
                continue
            files = [f.stat().st_size for f in path.rglob("*") if f.is_file()]
            step = int(path.name) if path.name.isdigit() else None
            out.append(Checkpoint(path.name, step, sum(files), path.stat().st_mtime))
        except OSError:  # a run in progress has just thrown it away
            continue
    return sorted(out, key=lambda c: (c.step is None, c.step or 0, c.name))


def _evaluations(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """evaluations.jsonl; of workdirs older than that file, evaluation.json."""
    found = lines(workdir / "evaluations.jsonl")
    latest = _object(workdir / "evaluation.json")
    return found or ([latest] if latest else [])


def read(workdir: pathlib.Path) -> Run:
    """All that is known of a run. Raises UserError where there is no run."""
    if not any((workdir / name).is_file() for name in ("config.json", "metrics.jsonl", environment.FILE)):
        raise UserError(
            f"--workdir={workdir} holds no run: start one with `jax-diffusion train --config=digits "
            f"--workdir={workdir}`"
        )
    metrics, speed = (list(read_lines(workdir / f"{name}.jsonl")) for name in ("metrics", "speed"))
    starts = lines(workdir / environment.FILE)
    series = collect([*metrics, *speed])
    timed = [{"step": r["step"], "clock": r.get("time")} for r in speed or metrics]  # older runs wrote one file
    return Run(
        name=workdir.name or workdir.absolute().name,
        workdir=workdir,
        config=_config(workdir / "config.json"),
        facts=_object(workdir / "dataset.json"),
        starts=starts,
        warnings=lines(workdir / journal.FILE),
        series=series,
        clock=collect(timed).get("clock", Series(np.zeros(0, np.int64), np.zeros(0))),
        marks=_marks(starts, series.get("rollbacks")),
        samples=_samples(workdir / "samples"),
        checkpoints=_checkpoints(workdir / "checkpoints"),
        evaluations=_evaluations(workdir),
    )
