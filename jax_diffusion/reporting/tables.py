"""The tables of the page: HTML text. Every word from a workdir passes through html.escape."""

import html
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jax_diffusion import config as configs
from jax_diffusion.reporting.run import Run, when
from jax_diffusion.train.report import count


def text(value: Any) -> str:
    return html.escape(str(value))


def table(head: Sequence[str], rows: Iterable[Sequence[str]], marked: Sequence[int] = (), name: str = "") -> str:
    """A table in its own box, which scrolls. Cells are HTML.  marked: rows to stand out."""
    rows = list(rows)
    if not rows:
        return ""
    head_cells = "".join(f"<th scope=col>{cell}</th>" for cell in head)
    body = "".join(
        f"<tr{' class=marked' if i in marked else ''}><th scope=row>{row[0]}</th>"
        + "".join(f"<td>{cell}</td>" for cell in row[1:])
        + "</tr>\n"
        for i, row in enumerate(rows)
    )
    given = f' data-table="{text(name)}"' if name else ""
    return (
        f"<div class=box tabindex=0><table{given}><thead><tr>{head_cells}</tr></thead>\n<tbody>{body}</tbody>"
        "</table></div>\n"
    )


def short(value: Any) -> str:
    """A number as people read it; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (math.isfinite(value) and float(value).is_integer() and abs(value) < 1e9):
        return f"{int(value):,}"
    return f"{value:.4g}"


def size(n: float) -> str:
    return count(n, "B")


def metrics(run: Run) -> str:
    """Every metric: last, least, greatest, where."""

    def extreme(series, pick) -> str:
        if not len(series.finite):
            return "-"
        value = pick(series.finite)
        return f"{short(float(value))} <small>at {series.steps[series.values.tolist().index(value)]:,}</small>"

    rows = [
        (text(name), text(short(float(s.values[-1]))), f"{s.steps[-1]:,}", extreme(s, min), extreme(s, max),
         f"{len(s.steps):,}")
        for name, s in sorted(run.series.items())
    ]  # fmt: skip
    return table(("metric", "last", "at step", "least", "greatest", "values"), rows, name="metrics")


def flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"steps": 5}} -> {"train.steps": 5}."""
    out: dict[str, Any] = {}
    for key, value in node.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return out


def recipe(run: Run) -> tuple[str, configs.ConfigDict]:
    """The recipe that a run was started with and its config; the package's default where it is not one of ours.

    A recipe of the user's own is a program: a page about a run does not start it.
    """
    for start in run.starts:
        words = [w for w in start.get("command") or [] if isinstance(w, str)]
        given = [w.removeprefix("--config=") for w in words if w.startswith("--config=")]
        given += [after for word, after in itertools.pairwise(words) if word == "--config"]
        for name, path in configs.recipes().items():
            if given and given[0] in (name, f"configs/{path.name}", f"./configs/{path.name}"):
                return name, configs.resolve(str(path))
    return "default", configs.default()


def config(runs: Sequence[Run]) -> str:
    """Every field, those first that differ from the recipe's, or between the runs."""
    known = [r for r in runs if r.config is not None]
    if not known:
        return ""
    name, base = recipe(known[0])
    base, own = flat(base.to_dict()), [flat(r.config.to_dict()) for r in known if r.config is not None]
    fields = sorted(set(base).union(*own))
    missing = "(unset)"

    def same(field):
        return all(o.get(field, missing) == base.get(field, missing) for o in own)

    def rows(kept):
        for f in fields:
            if kept(f):
                yield (text(f), *(text(o.get(f, missing)) for o in own), text(base.get(f, missing)))

    head = ("field", *(text(r.name) for r in known), f"{text(name)}'s")
    differing = table(head, rows(lambda f: not same(f)), name="config")
    everything = table(head, rows(lambda f: True), [i for i, f in enumerate(fields) if not same(f)], name="all-config")
    what = f"the recipe {name}" if name != "default" else "the package's defaults"
    return (
        differing or f"<p>As {text(what)} has it.</p>"
    ) + f"<details><summary>all {len(fields)} fields</summary>{everything}</details>\n"


def environment(run: Run) -> str:
    """The last start in full, and all starts."""
    if not run.starts:
        return "<p>Not recorded: the run is older than environment.jsonl.</p>"
    last = run.starts[-1]
    versions, code = last.get("versions") or {}, last.get("code") or {}
    changed = ", with changes" if code.get("changed") else ""
    rows = [
        ("command", f"<code>{text(' '.join(map(str, last.get('command') or [])))}</code>"),
        ("devices", text(", ".join(f"{n} x {kind}" for kind, n in (last.get("devices") or {}).items()))),
        ("mesh", text(", ".join(f"{k} {v}" for k, v in (last.get("mesh") or {}).items()))),
        ("processes", text(last.get("processes", "?"))),
        ("host", text(f"{last.get('host', '?')}: {last.get('system', '?')}, {last.get('cpus', '?')} CPUs")),
        ("code", text(f"{code['commit'][:12]} of {code.get('of', '?')}{changed}") if code.get("commit") else "-"),
        *((text(k), f"<code>{text(v)}</code>") for k, v in (last.get("variables") or {}).items()),
        *((text(k), text(v)) for k, v in versions.items()),
    ]
    out = table(("last start", when(last.get("time"))), rows, name="environment")
    if len(run.starts) > 1:
        starts = [
            (when(s.get("time")), text(short(s.get("step", "?"))), text(s.get("host", "?")),
             text(", ".join(f"{n} x {k}" for k, n in (s.get("devices") or {}).items())),
             text((s.get("versions") or {}).get("jax", "?")), text(((s.get("code") or {}).get("commit") or "-")[:12]))
            for s in run.starts
        ]  # fmt: skip
        out += table(("start", "at step", "host", "devices", "jax", "commit"), starts, name="starts")
    return out


def checkpoints(run: Run) -> str:
    losses = run.series.get("val_loss")
    at = {} if losses is None else dict(zip(losses.steps.tolist(), losses.values.tolist(), strict=True))
    rows = [
        (f"{c.step:,}" if c.step is not None else text(c.name), size(c.bytes), when(c.time),
         short(at[c.step]) if c.step in at else "-")
        for c in run.checkpoints
    ]  # fmt: skip
    total = f"<p>{size(sum(c.bytes for c in run.checkpoints))} in all.</p>" if rows else "<p>None yet.</p>"
    return table(("step", "size", "written", "validation loss"), rows, name="checkpoints") + total


def evaluations(run: Run) -> str:
    """A column a setting and a figure: whatever was recorded, numbers of nested groups by their path."""
    flats = [flat(e) for e in run.evaluations]
    names = [n for n in dict.fromkeys(k for f in flats for k in f) if "per_class" not in n]
    rows = [[when(f[n]) if n == "time" else text(short(f[n])) if n in f else "-" for n in names] for f in flats]
    return table([text(n) for n in names], rows, name="evaluations")
