"""From timed rounds to rows, a table and JSON."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from jax_diffusion.bench import measure
from jax_diffusion.io.whole import whole
from jax_diffusion.train.report import count


def rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One for each case, mode, batch, framework and variant, from all its phases; failures among them.

    ratio: how many times as fast JAX is, median and quartiles over rounds: in a row of PyTorch's, JAX's default beside
    it; in one of JAX's, itself beside the best of PyTorch's, which is that with the lowest ratio.
    """
    groups: dict[tuple, list[dict]] = {}
    for phase in result["phases"]:
        groups.setdefault((phase["case"], phase["mode"], phase["batch"]), []).append(phase)
    ceiling = max(result["ceilings"].values(), default=0.0)
    out = []
    for key, phases in groups.items():
        timed = [p for p in phases if "entries" in p]
        beside = {p["theirs"]: _ratio(p, "default", p["theirs"]) for p in timed if p["theirs"]}
        beside = {name: ratio for name, ratio in beside.items() if ratio is not None}
        best = min(beside, key=lambda name: beside[name].median, default=None)
        work = max((e.get("flops", 0) for p in timed for e in p["entries"].values()), default=0)
        entries: dict[tuple[str, str], list[dict]] = {}
        for phase in timed:
            for label, entry in phase["entries"].items():
                entries.setdefault((entry["framework"], label), []).append(entry)
        for (framework, label), found in entries.items():
            if framework == "torch":
                ratio = beside.get(label)
            else:
                chosen = [p for p in timed if p["theirs"] == best] if best else []
                ratio = _ratio(chosen[0], label, best) if chosen else None
            out.append(_row(key, framework, label, found, work, ceiling, ratio, label == best))
        for phase in phases:
            if "failed" in phase:
                out.append({**dict(zip(("case", "mode", "batch"), key, strict=True)), **phase["failed"]})
    return out


def _ratio(phase: dict[str, Any], ours: str, theirs: str) -> measure.Quartiles | None:
    entries = phase["entries"]
    if ours not in entries or theirs not in entries:
        return None
    found = measure.ratios(entries[ours]["step_s"], entries[theirs]["step_s"])
    return measure.quartiles(found) if found else None


def _row(key, framework, label, found, work, ceiling, ratio, best) -> dict[str, Any]:
    case, mode, batch = key
    step = measure.quartiles([s for entry in found for s in entry["step_s"]])
    return {
        "case": case,
        "mode": mode,
        "batch": batch,
        "framework": framework,
        "variant": label,
        "best_of_torch": best,
        "rounds": sum(len(entry["step_s"]) for entry in found),
        "step_s": step._asdict(),
        "images_per_s": batch / step.median,
        "flops": work,
        "flops_per_s": work / step.median,
        "share_of_ceiling": work / step.median / ceiling if ceiling else None,
        "peak_memory": max(entry["peak_memory"] for entry in found),
        "program_memory": max(entry.get("program_memory", 0) for entry in found),
        "compile_s": found[0]["compile_s"],
        "ratio": ratio._asdict() if ratio else None,
    }


def phase_line(phase: dict[str, Any]) -> str:
    """Some rounds in one line, as they end."""
    parts = []
    for label, entry in phase["entries"].items():
        step = measure.quartiles(entry["step_s"]).median
        parts.append(f"{entry['framework']} {label} {count(phase['batch'] / step, 'img/s')}")
    ratio = _ratio(phase, "default", phase["theirs"]) if phase["theirs"] else None
    said = f"; jax is {ratio.median:.2f}x as fast ({ratio.q1:.2f} to {ratio.q3:.2f})" if ratio else ""
    return f"batch {phase['batch']}: {', '.join(parts)}{said}"


HEAD = ("", "img/s", "ms a step (quartiles)", "FLOP/s", "of matmul", "memory", "compile", "jax is")


def table(result: dict[str, Any]) -> str:
    """The rows for a terminal. `*` is the best of PyTorch's, which JAX's own rows stand beside."""
    lines, last = [], None
    found = result["rows"]
    body = [_cells(row) for row in found]
    widths = [max(len(line[i]) for line in (HEAD, *body)) for i in range(len(HEAD))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join((first, *rest)).rstrip()

    for row, cells in zip(found, body, strict=True):
        title = f"{row['case']} {row['mode']}, batch {row['batch']}"
        if title != last:
            lines += ["", title, line(HEAD)]
            last = title
        lines.append(f"  {row['framework']} {row['variant']}: failed: {row['why']}" if "why" in row else line(cells))
    ceilings = ", ".join(f"{name} {count(rate, 'FLOP/s')}" for name, rate in result["ceilings"].items())
    if ceilings:
        lines += ["", f"one large matrix product, {result['settings']['dtype']}: {ceilings}"]
    lines += [f"failed: {why}" for why in result["failures"]]
    return "\n".join(lines).lstrip("\n")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    if "why" in row:
        return ("",) * len(HEAD)
    s, r = row["step_s"], row["ratio"]
    ms = [f"{1000 * v:,.0f}" if v >= 1 else f"{1000 * v:.4g}" for v in (s["median"], s["q1"], s["q3"])]
    share = row["share_of_ceiling"]
    return (
        f"  {row['framework']} {row['variant']}{' *' if row['best_of_torch'] else ''}",
        count(row["images_per_s"]),
        f"{ms[0]} ({ms[1]} to {ms[2]})",
        count(row["flops_per_s"]),
        f"{100 * share:.0f} %" if share else "",
        f"{count(row['peak_memory'], 'B')}" if row["peak_memory"] else "",
        f"{row['compile_s']:.1f} s",
        f"{r['median']:.2f}x ({r['q1']:.2f} to {r['q3']:.2f})" if r else "",
    )


def write(path: str | pathlib.Path, result: dict[str, Any]) -> None:
    """The whole result as JSON; never half a file."""
    with whole(path) as draft:
        draft.write_text(json.dumps(result, indent=1) + "\n")
