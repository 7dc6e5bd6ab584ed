"""A picture of a table: the times it visits and what it does there."""

from typing import TYPE_CHECKING

import numpy as np

from jax_diffusion.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from jax_diffusion.solvers.table import Table

MOST_NUMBERS = 12  # rows up to which the cells say their numbers
NOISE_COLOUR, TIME_COLOUR = "#b5651d", "#1f4e79"
NEGATIVE, POSITIVE = "#d6604d", "#4393c3"  # light enough for black numbers


def plot(table: "Table") -> "Figure":
    """Left, the time of every evaluation; right, its row: A of the state, B of the predictions, and where there is
    noise C. Raises UserError without matplotlib."""
    try:
        from matplotlib.colors import LinearSegmentedColormap, SymLogNorm
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise UserError("plotting needs matplotlib: pip install 'jax_diffusion[plot]'") from None

    n = len(table)
    rows = np.arange(n)
    figure = Figure(figsize=(10, float(np.clip(1.8 + 0.3 * n, 4, 9))), layout="constrained")
    figure.suptitle(f"{table.name}: {n} evaluations")
    widths = [3, 2 + 0.8 * table.used_memory] + ([1.5] if np.any(table.C) else [])
    times, cells, *noise = figure.subplots(1, len(widths), sharey=True, width_ratios=widths)

    times.plot(table.t, rows, "o-", color=TIME_COLOUR, markersize=4, linewidth=1)
    times.set(xlabel="time t", ylabel="evaluation", title="noise level")
    if np.all(table.t > 0) and table.t.max() > 1000 * table.t.min():
        times.set_xscale("log")
    times.grid(alpha=0.3)

    values = np.column_stack([table.A, table.B[:, : table.used_memory]] + ([table.R] if np.any(table.R) else []))
    largest = float(np.abs(values).max())
    # Coefficients span decades, and their signs matter most.
    norm = SymLogNorm(linthresh=max(largest / 100, 1e-12), vmin=-largest, vmax=largest)
    colours = LinearSegmentedColormap.from_list("signed", [NEGATIVE, "white", POSITIVE])
    image = cells.imshow(values, aspect="auto", cmap=colours, norm=norm, interpolation="nearest")
    ages = ["B0\nD", *(f"B{k}\n{k} before" for k in range(1, table.used_memory))]
    columns = ["A\nstate", *ages, *(["R\nraw - D"] if np.any(table.R) else [])]
    cells.set_xticks(range(len(columns)), columns)
    cells.set_title("weights")
    if n <= MOST_NUMBERS:
        for (i, j), value in np.ndenumerate(values):
            if value:
                cells.text(j, i, f"{value:.3g}", ha="center", va="center", fontsize=8)
    figure.colorbar(image, ax=cells, shrink=0.8, label="weight")

    for axes in noise:
        axes.barh(rows, table.C, color=NOISE_COLOUR, height=0.7)
        axes.set(xlabel="standard deviation", title="C: noise added")
    times.yaxis.set_major_locator(MaxNLocator(integer=True))
    times.set_ylim(n - 0.5, -0.5)  # the first evaluation on top
    return figure
