"""What a reader should know before the curves: what went wrong in a run, in sentences."""

import numpy as np

from jax_diffusion.reporting.run import Run, when

SHOWN = 5  # names, steps or warnings of one kind that are listed
STALE_INPUT = 0.1  # of the time: then the devices wait for their data


def _some(items: list[str]) -> str:
    more = f" and {len(items) - SHOWN:,} more" if len(items) > SHOWN else ""
    return ", ".join(items[:SHOWN]) + more


def _risen(run: Run, name: str) -> tuple[int, list[str]]:
    """How far a counter has come, and the steps by which it had risen."""
    series = run.series.get(name)
    if series is None or not len(series.finite):
        return 0, []
    rises = np.flatnonzero(np.diff(np.concatenate([[0.0], series.values])) > 0)
    return int(series.finite[-1]), [f"{series.steps[i]:,}" for i in rises.tolist()]


def findings(run: Run) -> list[str]:
    """Sentences, the gravest first; [] of an undisturbed run."""
    out = []
    for name, what in (
        ("rollbacks", "times the run went back to a checkpoint"),
        ("skipped", "steps were skipped, their loss or gradient was not finite"),
        ("spikes", "steps were skipped, their loss or gradient was far above its mean"),
    ):
        total, steps = _risen(run, name)
        if total:
            out.append(f"{total:,} {what}; counted by step {_some(steps)}")
    broken: dict[str, list[str]] = {}
    for name, series in sorted(run.series.items()):
        bad = series.steps[~np.isfinite(series.values)]
        if len(bad):
            at = _some([f"{step:,}" for step in bad.tolist()])
            broken.setdefault(f"not finite at {len(bad):,} of {len(series.steps):,} steps: {at}", []).append(name)
    out += [f"{_some(names)}: {what}" for what, names in broken.items()]
    if corrupt := [str(name) for name in run.facts.get("skipped") or []]:
        out.append(f"{len(corrupt):,} files of the data could not be read and were left out: {_some(corrupt)}")
    if aside := [c.name for c in run.checkpoints if c.step is None]:
        out.append(f"checkpoints that were not finished or set aside: {_some(aside)}")
    if len(run.starts) > 1:
        steps = [f"{s['step']:,}" for s in run.starts[1:] if isinstance(s.get("step"), int)]
        out.append(f"started {len(run.starts):,} times; again at step {_some(steps)}")
    waits = run.series.get("input_wait") or run.series.get("input/wait")
    if waits is not None and len(waits.finite) and (share := float(np.median(waits.finite))) > STALE_INPUT:
        out.append(f"the devices wait for their data {share:.0%} of the time (median)")
    said = [f"{when(w.get('time'))}: {w['line']}" for w in run.warnings if isinstance(w.get("line"), str)]
    if len(said) > 4 * SHOWN:
        out.append(f"{len(said):,} warnings, of which the newest {4 * SHOWN} follow (all: warnings.jsonl)")
    return out + said[-4 * SHOWN :]
