"""Accuracy against cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from experiments.report.cells import Cell
from experiments.report.figures.ablation import draw_references, series_styles
from experiments.report.numerals import UNITS, unit
from experiments.report.style import BLACK, ORANGE, legend, panels, styled

SECONDS = ((1.0, ""), (1e-3, "milli"))
COSTS: tuple[tuple[str, Callable[[Cell], float], Sequence[tuple[float, str]]], ...] = (
    ("FLOPs", lambda cell: cell.flops, UNITS),
    ("seconds", lambda cell: cell.latency, SECONDS),
    ("bytes of keys and values", lambda cell: cell.cache_bytes, UNITS),
)


@styled
def cost_figure(cells: Sequence[Cell]) -> Figure:
    """Accuracy against FLOPs of a prompt, and against its latency and the bytes that it leaves in the cache where they were
    measured: one line for each compressor and pre-fusion depth, along the token counts.

    Bars: 95% bootstrap intervals over examples and seeds; horizontal lines as in `ablation_figure`. Filled markers are
    the first compressor by name, open ones the second. Dashed: the Pareto front. Raises ValueError without a finished
    cell that counts FLOPs.
    """
    finished = [cell for cell in cells if cell.accuracy is not None]
    counted = [panel for panel in COSTS if any(panel[1](cell) > 0 for cell in finished)]
    if not any(cell.flops > 0 for cell in finished):
        raise ValueError("no finished ablation cell counts its FLOPs")
    figure, axes = panels(len(counted), columns=2, height=3.4, label="Accuracy (%)")
    for axis, panel in zip(axes, counted, strict=True):
        _panel(axis, cells, *panel)
    legend(figure, axes, columns=3)
    return figure


def _panel(
    axis: Axes,
    cells: Sequence[Cell],
    name: str,
    cost: Callable[[Cell], float],
    units: Sequence[tuple[float, str]],
) -> None:
    counted = [cell for cell in cells if cell.accuracy is not None and cost(cell) > 0]
    scale, prefix = unit(min(cost(cell) for cell in counted), units)
    swept = [cell for cell in counted if not cell.is_baseline]
    series = series_styles([cell for cell in cells if not cell.is_baseline])
    compressors = sorted({cell.compressor for cell in swept})

    def points(line: Sequence[Cell], style: dict[str, Any]) -> None:
        line = sorted(line, key=cost)
        mean, low, high = 100 * np.asarray([cell.accuracy for cell in line]).T
        x = [cost(cell) / scale for cell in line]
        axis.errorbar(x, mean, yerr=(mean - low, high - mean), **style, capsize=2, elinewidth=1)

    for number, compressor in enumerate(compressors):
        for (layers, settings), style in series.items():
            line = [
                c for c in swept if (c.compressor, c.prefusion_layers, c.settings) == (compressor, layers, settings)
            ]
            if line:
                face = style["color"] if number % 2 == 0 else "white"
                label = {"label": f"{compressor}, {style['label']}", "markerfacecolor": face}
                points(line, {**style, **label})
    for baseline in (cell for cell in counted if cell.is_baseline):
        points([baseline], {"color": BLACK, "marker": "*", "markersize": 9, "linestyle": "none"})
    front = pareto_front([(cost(cell), cell.accuracy.mean) for cell in counted if cell.accuracy is not None])
    x, y = zip(*((value / scale, 100 * mean) for value, mean in front), strict=True)
    axis.plot(x, y, color=ORANGE, linestyle="--", linewidth=3.5, alpha=0.5, zorder=1, label="Pareto front")
    draw_references(axis, cells)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    costs = [cost(cell) / scale for cell in counted]
    limits = min(costs) / 1.15, max(costs) * 1.15
    axis.set_xticks(_ticks(*limits))
    axis.set_xlim(*limits)
    axis.set_xlabel(f"Cost of a prompt ({prefix}{name}, log scale)")


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of points (cost, accuracy) those that no other beats at the same cost or less, cheapest first."""
    front: list[tuple[float, float]] = []
    for cost, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or accuracy > front[-1][1]:
            front.append((cost, accuracy))
    return front


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between `low` and `high`: 1, 2, 3, 5 and 7 times powers of ten."""
    powers = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    return [digit * power for power in powers for digit in (1, 2, 3, 5, 7) if low <= digit * power <= high]
