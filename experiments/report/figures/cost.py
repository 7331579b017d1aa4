"""Accuracy against cost: of a sweep's cells, and of a study's rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from experiments.report.experiment_results import Study, references
from experiments.report.figures.ablation import draw_references, series_styles
from experiments.report.figures.point_labels import number_key, number_points
from experiments.report.figures.style import BLACK, BLUE, ORANGE, REFERENCES, legend, panels, styled
from experiments.report.formatting import UNITS, unit
from experiments.report.run_groups import Cell


class Cost(NamedTuple):
    """One way to count what a prompt costs: its name on an axis, that of a cell, and the units that it is shown in."""

    name: str
    of: Callable[[Cell], float]
    units: Sequence[tuple[float, str]]

    def counted(self, cells: Iterable[Cell]) -> list[Cell]:
        """The cells of which this cost and the accuracy are known."""
        return [cell for cell in cells if cell.accuracy is not None and self.of(cell) > 0]


COSTS = (
    Cost("FLOPs", lambda cell: cell.flops, UNITS),
    Cost("seconds", lambda cell: cell.latency, ((1.0, ""), (1e-3, "milli"))),
    Cost("bytes of keys and values", lambda cell: cell.cache_bytes, UNITS),
)
_ALIKE = 1.001
"""Costs whose ratio is below this are no choice between rows."""


@styled
def cost_figure(cells: Sequence[Cell]) -> Figure:
    """Accuracy against FLOPs of a prompt, and against its latency and the bytes that it leaves in the cache where they were
    measured: one line for each compressor and pre-fusion depth, along the token counts.

    Bars: 95% bootstrap intervals over examples and seeds; horizontal lines as in `ablation_figure`. Filled markers are
    the first compressor by name, open ones the second. Dashed: the Pareto front. Raises ValueError without a finished
    cell that counts FLOPs.
    """
    measured = [cost for cost in COSTS if cost.counted(cells)]
    if COSTS[0] not in measured:
        raise ValueError("no finished ablation cell counts its FLOPs")
    figure, axes = panels(len(measured), columns=2, height=3.4, label="Accuracy (%)")
    for axis, cost in zip(axes, measured, strict=True):
        _panel(axis, cost, _series(cost.counted(cells), cells))
        draw_references(axis, cells)
    legend(figure, axes, columns=3)
    return figure


@styled
def study_cost_figure(study: Study) -> Figure:
    """Accuracy of a study's rows against each cost in which they differ, the rows numbered as the table has them.

    Bars: 95% bootstrap intervals over examples and seeds. Dashed: the Pareto front. Horizontal lines: a guess from the
    text alone, a blank picture. Raises ValueError where rows differ in no cost.
    """
    costs = costs_apart(study)
    if not costs:
        raise ValueError(f"no two finished rows of {study.name} differ in what they cost")
    figure, axes = panels(len(costs), columns=2, height=3.4, label="Accuracy (%)")
    rows = {row.number + 1: row.cell for row in study.finished if row.cell is not None}
    style = {"color": BLUE, "marker": "o", "linestyle": "none", "label": "row, 95% interval"}
    for axis, cost in zip(axes, costs, strict=True):
        _panel(axis, cost, [(cost.counted(rows.values()), style)])
        for name, value in references(study).items():
            axis.axhline(100 * value, **REFERENCES[1 if "blank" in name else 2], linewidth=1.1, zorder=1.5, label=name)
    for axis, cost in zip(axes, costs, strict=True):  # the common limits are known once all are drawn
        counted = {number: cell for number, cell in rows.items() if cost.counted([cell])}
        number_points(axis, list(counted), *_points(cost, list(counted.values()), _unit(cost, counted.values())[0]))
    legend(figure, axes, columns=3)
    number_key(figure, {row.number + 1: row.label for row in study.finished})
    return figure


def costs_apart(study: Study) -> tuple[Cost, ...]:
    """The costs in which finished rows of a study differ."""
    cells = [row.cell for row in study.finished if row.cell is not None]
    found = ((cost, [cost.of(cell) for cell in cost.counted(cells)]) for cost in COSTS)
    return tuple(cost for cost, values in found if values and max(values) > _ALIKE * min(values))


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of points (cost, accuracy) those that no other beats at the same cost or less, cheapest first."""
    front: list[tuple[float, float]] = []
    for cost, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or accuracy > front[-1][1]:
            front.append((cost, accuracy))
    return front


def _series(counted: Sequence[Cell], cells: Sequence[Cell]) -> list[tuple[Sequence[Cell], dict[str, Any]]]:
    """The counted ones of a sweep's cells in lines, each with its style; a star for a baseline."""
    swept = [cell for cell in counted if not cell.is_baseline]
    styles = series_styles([cell for cell in cells if not cell.is_baseline])
    found: list[tuple[Sequence[Cell], dict[str, Any]]] = []
    for number, compressor in enumerate(sorted({cell.compressor for cell in swept})):
        for key, style in styles.items():
            line = [c for c in swept if (c.compressor, (c.prefusion_layers, c.settings)) == (compressor, key)]
            face = style["color"] if number % 2 == 0 else "white"
            found.append((line, {**style, "label": f"{compressor}, {style['label']}", "markerfacecolor": face}))
    star = {"color": BLACK, "marker": "*", "markersize": 9, "linestyle": "none"}
    found += [([cell], star) for cell in counted if cell.is_baseline]
    return [(line, style) for line, style in found if line]


def _panel(axis: Axes, cost: Cost, lines: Sequence[tuple[Sequence[Cell], dict[str, Any]]]) -> None:
    """Lines of cells, each by rising cost, and the Pareto front of all of them."""
    cells = [cell for line, _ in lines for cell in line]
    scale, prefix = _unit(cost, cells)
    for line, style in lines:
        x, (mean, low, high) = _points(cost, sorted(line, key=cost.of), scale)
        axis.errorbar(x, mean, yerr=(mean - low, high - mean), **style, capsize=2, elinewidth=1)
    x, (mean, *_) = _points(cost, cells, scale)
    front = pareto_front(list(zip(x, mean, strict=True)))
    halo: dict[str, Any] = {
        "color": ORANGE,
        "marker": "o",
        "markersize": 9,
        "markeredgewidth": 0,
        "alpha": 0.5,
        "zorder": 1,
    }
    axis.plot(*zip(*front, strict=True), **halo, linestyle="--", linewidth=3.5, label="Pareto front")
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_locator(NullLocator())
    limits = min(x) / 1.15, max(x) * 1.15
    axis.set_xticks(_ticks(*limits))
    axis.set_xlim(*limits)
    axis.set_xlabel(f"Cost of a prompt ({prefix}{cost.name}, log scale)")


def _unit(cost: Cost, cells: Iterable[Cell]) -> tuple[float, str]:
    return unit(min(cost.of(cell) for cell in cells), cost.units)


def _points(cost: Cost, cells: Sequence[Cell], scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Costs [cells] and accuracies with their bounds in percent [3, cells]."""
    return np.array([cost.of(cell) / scale for cell in cells]), 100 * np.array([cell.accuracy for cell in cells]).T


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between `low` and `high`: 1, 2, 3, 5 and 7 times powers of ten, or evenly apart."""
    if high < 4 * low:
        return [value for value in MaxNLocator(5).tick_values(low, high) if low <= value <= high]
    powers = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    return [digit * power for power in powers for digit in (1, 2, 3, 5, 7) if low <= digit * power <= high]
