"""Accuracy against cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from experiments.report.cells import Cell
from experiments.report.figures.ablation import draw_references, series_styles
from experiments.report.style import BLACK, legend, panels, styled

UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))


def unit(value: float) -> tuple[float, str]:
    """The largest unit in which `value` is at least 1: (1e9, "G") for 2.5e9."""
    return next((pair for pair in UNITS if value >= pair[0]), UNITS[-1])


@styled
def cost_figure(cells: Sequence[Cell]) -> Figure:
    """Accuracy against FLOPs of a prompt: one line for each compressor and pre-fusion depth, along the token counts.

    Bars: 95% bootstrap intervals over examples and seeds; horizontal lines as in `ablation_figure`. Filled markers are
    the first compressor by name, open ones the second. Raises ValueError without a finished cell that counts FLOPs.
    """
    counted = [cell for cell in cells if cell.accuracy is not None and cell.flops > 0]
    if not counted:
        raise ValueError("no finished ablation cell counts its FLOPs")
    scale, prefix = unit(min(cell.flops for cell in counted))
    figure, axes = panels(1, columns=1, height=3.4, label="Accuracy (%)")
    axis = axes[0]
    swept = [cell for cell in counted if not cell.is_baseline]
    series = series_styles([cell for cell in cells if not cell.is_baseline])
    compressors = sorted({cell.compressor for cell in swept})
    for number, compressor in enumerate(compressors):
        for (layers, settings), style in series.items():
            line = [
                c for c in swept if (c.compressor, c.prefusion_layers, c.settings) == (compressor, layers, settings)
            ]
            if line:
                face = style["color"] if number % 2 == 0 else "white"
                label = {"label": f"{compressor}, {style['label']}", "markerfacecolor": face}
                _draw(axis, sorted(line, key=lambda c: c.flops), scale, {**style, **label})
    for baseline in (cell for cell in counted if cell.is_baseline):
        _draw(axis, [baseline], scale, {"color": BLACK, "marker": "*", "markersize": 9, "linestyle": "none"})
    draw_references(axis, cells)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    costs = [cell.flops / scale for cell in counted]
    limits = min(costs) / 1.15, max(costs) * 1.15
    axis.set_xticks(_ticks(*limits))
    axis.set_xlim(*limits)
    axis.set_xlabel(f"Cost of a prompt ({prefix}FLOPs, log scale)")
    legend(figure, axes, columns=3)
    return figure


def _draw(axis: Axes, line: Sequence[Cell], scale: float, style: dict[str, Any]) -> None:
    mean, low, high = 100 * np.asarray([cell.accuracy for cell in line]).T
    x = [cell.flops / scale for cell in line]
    axis.errorbar(x, mean, yerr=(mean - low, high - mean), **style, capsize=2, elinewidth=1)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between `low` and `high`: 1, 2, 3, 5 and 7 times powers of ten."""
    powers = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    return [digit * power for power in powers for digit in (1, 2, 3, 5, 7) if low <= digit * power <= high]
