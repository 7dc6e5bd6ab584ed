"""The result as a picture: how fast each is beside the best of PyTorch, and images a second against the batch."""

import os
from typing import Any


def draw(path: str | os.PathLike, result: dict[str, Any]) -> None:
    """Bars of images a second, a panel for each case and mode at its largest batch; curves where there are several."""
    from matplotlib.figure import Figure

    rows = [r for r in result["rows"] if "why" not in r]
    panels: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        panels.setdefault((row["case"], row["mode"]), []).append(row)
    count = max(len(panels), 1)
    figure = Figure(figsize=(11, 0.6 + 3.2 * count), layout="constrained")
    curves = any(len({r["batch"] for r in found}) > 1 for found in panels.values())
    axes = figure.subplots(count, 1 + curves, squeeze=False)
    for (bars, *curve), ((case, mode), found) in zip(axes, panels.items(), strict=False):
        _bars(bars, found, f"{case}, {mode}")
        if curves:
            _curve(curve[0], found)
    device = result["machine"].get("jax", {}).get("device", "")
    figure.suptitle(f"{device}, {result['settings'].get('dtype', '')}: jax_diffusion and PyTorch")
    figure.savefig(path, dpi=110)


def _color(row: dict[str, Any]) -> str:
    return "tab:blue" if row["framework"] == "jax" else "tab:orange" if row["best_of_torch"] else "moccasin"


def _bars(axis, rows: list[dict], title: str) -> None:
    batch = max(r["batch"] for r in rows)
    shown = [r for r in rows if r["batch"] == batch][::-1]
    rates = [r["images_per_s"] for r in shown]
    span = [(abs(r["batch"] / r["step_s"]["q3"] - v), abs(r["batch"] / r["step_s"]["q1"] - v))
            for r, v in zip(shown, rates, strict=True)]  # fmt: skip
    axis.barh(range(len(shown)), rates, xerr=list(zip(*span, strict=True)), color=[_color(r) for r in shown])
    axis.set_yticks(range(len(shown)), [f"{r['framework']} {r['variant']}" for r in shown])
    axis.set_title(f"{title}, batch {batch}", fontsize="medium")
    axis.set_xlabel("images a second")


def _curve(axis, rows: list[dict]) -> None:
    names = list(dict.fromkeys((r["framework"], r["variant"]) for r in rows))
    for framework, variant in names:
        found = sorted((r for r in rows if (r["framework"], r["variant"]) == (framework, variant)),
                       key=lambda r: r["batch"])  # fmt: skip
        style = "o-" if framework == "jax" else "s--"
        axis.plot(
            [r["batch"] for r in found], [r["images_per_s"] for r in found], style, label=f"{framework} {variant}"
        )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("batch")
    axis.set_ylabel("images a second")
    axis.legend(fontsize="x-small")
