"""The page: one file that needs nothing else, not even a network. Its curves are drawn by page.js from one JSON."""

import base64
import datetime
import io
import json
import pathlib
import re
import time
from collections.abc import Sequence
from typing import Any

from PIL import Image

from jax_diffusion.errors import UserError
from jax_diffusion.io.whole import whole
from jax_diffusion.reporting import series, tables
from jax_diffusion.reporting.findings import findings
from jax_diffusion.reporting.run import Run, read, when
from jax_diffusion.train.report import count, duration
from jax_diffusion.train.writers import is_clock

PICTURES = 40  # of each run, the first and the last among them
PICTURE_BYTES = 10 << 20  # of all runs together
LOSSLESS_BYTES = 100_000  # a larger PNG is shown as WebP, at most WIDEST pixels wide
WIDEST = 1200
TOGETHER = {"val_loss": "loss", "objective": "loss"}  # what is drawn in another metric's axes


def _picture(path: pathlib.Path) -> str | None:
    """A data: URI of a picture; None of one that cannot be read, half written say."""
    try:
        data, kind = path.read_bytes(), "png"
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            if len(data) > LOSSLESS_BYTES:
                small = image.convert("RGB")
                small.thumbnail((WIDEST, 4 * WIDEST))
                out = io.BytesIO()
                small.save(out, "webp", quality=85)
                data, kind = out.getvalue(), "webp"
    except (OSError, SyntaxError, ValueError):  # what Pillow raises
        return None
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _spread(n: int, most: int) -> list[int]:
    """At most `most` of 0..n-1, evenly, the first and the last among them."""
    return list(range(n)) if n <= most else sorted({round(i * (n - 1) / (most - 1)) for i in range(most)})


def _samples(run: Run, room: int) -> list[dict[str, Any]]:
    """Pictures over time, as many as fit into `room` bytes."""
    most = PICTURES
    while True:
        chosen = [run.samples[i] for i in _spread(len(run.samples), most)]
        shown: list[dict[str, Any]] = [{"step": step, "src": uri} for step, path in chosen if (uri := _picture(path))]
        if most <= 2 or sum(len(p["src"]) for p in shown) <= room:
            return shown
        most = max(2, most // 2)


def _charts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What is drawn together: metrics of one name before the slash ("loss_t/0.00-0.25"), in the order of the page."""
    drawn = {n for r in runs for n, s in r.series.items() if s.values.any() or len(s.values) == 1}
    names = sorted(drawn, key=lambda n: [int(w) if w.isdigit() else w for w in re.split(r"(\d+)", n)])  # 2 before 10
    charts: dict[str, list[str]] = {}
    for name in names:
        charts.setdefault(TOGETHER.get(name, name).split("/")[0], []).append(name)

    def part(chart):
        return 2 if is_clock(chart) else 0 if chart.startswith(("loss", "val_")) else 1

    parts = ("Loss", "Training", "Speed and memory")
    order = sorted(charts, key=lambda c: (part(c), c != "loss", c))
    return [{"title": c, "part": parts[part(c)], "names": charts[c]} for c in order]


def data(runs: Sequence[Run]) -> dict[str, Any]:
    """The page's JSON: runs, each with its series, and the charts."""
    limit = series.POINTS // max(1, sum(len(r.series) for r in runs))
    limit = min(series.MOST, max(series.LEAST, limit))
    out = []
    for run in runs:
        first = min([s["time"] for s in run.starts if isinstance(s.get("time"), int | float)], default=None)
        if first is None and len(run.clock.values):
            first = float(run.clock.finite.min())
        hours = series.Series(run.clock.steps, (run.clock.values - (first or 0)) / 3600)
        out.append({
            "name": run.name,
            "series": {name: series.encode(s, limit) for name, s in sorted(run.series.items())},
            "hours": series.encode(hours, series.MOST),
            "marks": [m._asdict() for m in run.marks],
            "samples": _samples(run, PICTURE_BYTES // len(runs)),
        })  # fmt: skip
    return {"runs": out, "charts": _charts(runs)}


def _tiles(run: Run) -> str:
    """The run in a few figures."""
    last = {name: float(s.values[-1]) for name, s in run.series.items()}
    tiles = []
    if run.step is not None:
        share = f" of {run.steps:,}" if run.steps else ""
        tiles.append(("step", f"{run.step:,}{share}"))
        if len(run.clock.values):
            tiles.append(("last heard of", when(float(run.clock.values[-1]))))
    for name, what in (("loss", "loss"), ("val_loss", "validation loss")):
        if name in last:
            tiles.append((what, tables.short(last[name])))
    if (rate := last.get("images_per_s")) is not None:
        tiles.append(("speed", f"{rate:,.{0 if rate >= 100 else 2}f} images/s"))
        batch = run.config.train.batch_size if run.config is not None else None
        if batch and rate > 0 and run.steps and run.step is not None and run.step < run.steps:
            tiles.append(("time left at that speed", duration((run.steps - run.step) * batch / rate)))
    if "mfu" in last:
        tiles.append(("share of peak FLOP/s", f"{last['mfu']:.1%}"))
    if "input_wait" in last:
        tiles.append(("input wait", f"{last['input_wait']:.1%}"))
    for name, what in (("memory/device_peak", "device memory, peak"), ("memory/host_peak", "host memory, peak")):
        if name in last:
            tiles.append((what, count(last[name], "B")))
    return "<dl class=tiles>" + "".join(f"<div><dt>{k}</dt><dd>{tables.text(v)}</dd></div>" for k, v in tiles) + "</dl>"


def _about(run: Run) -> str:
    parts = [run.facts.get("name"), None if run.config is None else run.config.model.name]
    if isinstance(shape := run.facts.get("shape"), list):
        parts.insert(1, "x".join(map(str, shape)))
    if isinstance(n := run.facts.get("train_examples"), int):
        parts.insert(1, f"{n:,} examples")
    return tables.text(", ".join(str(p) for p in parts if p))


def _section(title: str, runs: Sequence[Run], of) -> str:
    """A section with what `of(run)` says, under each run's name where there are several."""
    said = [(run, of(run)) for run in runs]
    body = "".join(
        (f"<h3>{tables.text(run.name)}</h3>\n" if len(runs) > 1 else "") + text for run, text in said if text
    )
    return f"<section><h2>{title}</h2>\n{body}</section>\n" if body else ""


def _list(run: Run) -> str:
    items = "".join(f"<li>{tables.text(line)}</li>\n" for line in findings(run))
    return f"<ul class=findings>\n{items}</ul>\n" if items else ""


def _asset(name: str) -> str:
    return (pathlib.Path(__file__).parent / name).read_text()


def render(runs: Sequence[Run], now: float | None = None) -> str:
    """The page of one run or several, as text."""
    title = tables.text(" and ".join(r.name for r in runs))
    # Within a script element only these could end it.
    payload = json.dumps(data(runs), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    made = datetime.datetime.fromtimestamp(time.time() if now is None else now, datetime.UTC)
    empty = (
        ""
        if any(r.series for r in runs)
        else "<p>No metrics yet: the first line comes after train.log_every steps.</p>"
    )
    head = "".join(
        f"<h3>{tables.text(r.name)} <small>{_about(r)}</small></h3>{_tiles(r)}" if len(runs) > 1
        else f"<p>{_about(r)}</p>{_tiles(r)}" for r in runs
    )  # fmt: skip
    return f"""<!doctype html>
<html lang=en>
<head>
<meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<meta name=color-scheme content="light dark">
<title>{title}</title>
<style>
{_asset("page.css")}</style>
</head>
<body>
<header><h1>{title}</h1>{head}{empty}</header>
<main>
{_section("To know first", runs, _list)}<section id=samples hidden><h2>Samples</h2></section>
<section id=curves><h2>Curves</h2>
<noscript><p>The curves need JavaScript; the figures are below.</p></noscript></section>
{_section("Metrics", runs, tables.metrics)}{_section("Evaluations", runs, tables.evaluations)}<section><h2>Config</h2>
{tables.config(runs)}</section>
{_section("Checkpoints", runs, tables.checkpoints)}{_section("Environment", runs, tables.environment)}</main>
<footer>Written {made:%Y-%m-%d %H:%M:%S} UTC by jax-diffusion report.</footer>
<script type="application/json" id=data>{payload}</script>
<script>
{_asset("page.js")}</script>
</body>
</html>
"""


def write(workdirs: Sequence[str | pathlib.Path], out: str | pathlib.Path) -> int:
    """Writes the page of the runs in `workdirs` to the file `out` and returns its bytes.

    Raises UserError where there is no run, or `out` cannot be written.
    """
    runs = [read(pathlib.Path(w)) for w in workdirs]
    if len({r.name for r in runs}) < len(runs):  # runs/a/seed0 and runs/b/seed0
        runs = [r._replace(name=str(r.workdir)) for r in runs]
    content = render(runs).encode()
    out = pathlib.Path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with whole(out) as draft:
            draft.write_bytes(content)
    except OSError as e:
        raise UserError(f"--out={out} cannot be written: {e.strerror or e}") from e
    return len(content)
