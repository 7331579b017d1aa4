"""Cost figures: accuracy against cost, for the groups of an ablation and for the rows of an experiment."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from experiments.report.experiment_results import ExperimentResults, blind_accuracies
from experiments.report.figures.ablation import draw_references, series_styles
from experiments.report.figures.point_labels import draw_number_key, number_points
from experiments.report.figures.style import BLACK, BLUE, ORANGE, REFERENCES, legend, make_panels, styled
from experiments.report.formatting import UNITS, unit
from experiments.report.run_groups import RunGroup


class CostMeasure(NamedTuple):
    """One way to measure the cost of a prompt.

    Args:
        name: Name on an axis.
        value: Function that returns the cost of a run group, NaN if it was not measured.
        units: Units to display it in, as (factor, prefix), largest first.
    """

    name: str
    value: Callable[[RunGroup], float]
    units: Sequence[tuple[float, str]]

    def measured(self, groups: Iterable[RunGroup]) -> list[RunGroup]:
        """Return the groups that have both this cost and an accuracy."""
        return [group for group in groups if group.accuracy is not None and self.value(group) > 0]


COST_MEASURES = (
    CostMeasure("FLOPs", lambda group: group.flops, UNITS),
    CostMeasure("seconds", lambda group: group.latency, ((1.0, ""), (1e-3, "milli"))),
    CostMeasure("bytes of keys and values", lambda group: group.cache_bytes, UNITS),
)
_SMALLEST_RATIO = 1.001
"""Rows whose costs differ by a smaller ratio count as equally costly."""


@styled
def ablation_cost_figure(groups: Sequence[RunGroup]) -> Figure:
    """Draw accuracy against the cost of a prompt, one panel for each cost that was measured.

    The costs are FLOPs, prefill latency, and bytes in the key-value cache. There is one line for each compressor and
    pre-fusion depth, along the token counts. Bars are 95% bootstrap intervals over examples and seeds. Horizontal lines
    are those of `ablation_figure`. The first compressor by name has filled markers, the second open ones. The broad
    dashed line is the Pareto front.

    Args:
        groups: Run groups of the same family, trained alike on the same data.

    Raises:
        ValueError: if no finished group counts FLOPs.
    """
    measures = [measure for measure in COST_MEASURES if measure.measured(groups)]
    if COST_MEASURES[0] not in measures:
        raise ValueError("no finished ablation cell counts its FLOPs")
    figure, axes = make_panels(len(measures), columns=2, height=3.4, label="Accuracy (%)")
    for axis, measure in zip(axes, measures, strict=True):
        _draw_panel(axis, measure, _ablation_lines(measure.measured(groups), groups))
        draw_references(axis, groups)
    legend(figure, axes, columns=3)
    return figure


@styled
def experiment_cost_figure(results: ExperimentResults) -> Figure:
    """Draw the accuracy of an experiment's rows against each cost in which they differ, numbered as in the table.

    Bars are 95% bootstrap intervals over examples and seeds. The broad dashed line is the Pareto front. Horizontal lines
    are the blind controls.

    Args:
        results: The experiment's rows with their runs.

    Raises:
        ValueError: if the finished rows differ in no cost.
    """
    measures = differing_costs(results)
    if not measures:
        raise ValueError(f"no two finished rows of {results.name} differ in cost")
    figure, axes = make_panels(len(measures), columns=2, height=3.4, label="Accuracy (%)")
    groups = {row.number + 1: row.runs for row in results.finished_rows if row.runs is not None}
    style = {"color": BLUE, "marker": "o", "linestyle": "none", "label": "row, 95% interval"}
    for axis, measure in zip(axes, measures, strict=True):
        _draw_panel(axis, measure, [(measure.measured(groups.values()), style)])
        for name, value in blind_accuracies(results).items():
            axis.axhline(100 * value, **REFERENCES[1 if "blank" in name else 2], linewidth=1.1, zorder=1.5, label=name)
    for axis, measure in zip(axes, measures, strict=True):  # after all panels are drawn, because they share limits
        measured = {number: group for number, group in groups.items() if measure.measured([group])}
        scale, _ = _display_unit(measure, measured.values())
        number_points(axis, list(measured), *_points(measure, list(measured.values()), scale))
    legend(figure, axes, columns=3)
    draw_number_key(figure, {row.number + 1: row.label for row in results.finished_rows})
    return figure


def differing_costs(results: ExperimentResults) -> tuple[CostMeasure, ...]:
    """Return the costs in which the finished rows of an experiment differ."""
    groups = [row.runs for row in results.finished_rows if row.runs is not None]
    values = ((measure, [measure.value(group) for group in measure.measured(groups)]) for measure in COST_MEASURES)
    return tuple(measure for measure, costs in values if costs and max(costs) > _SMALLEST_RATIO * min(costs))


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points (cost, accuracy) that no other point beats at the same cost or less, cheapest first."""
    front: list[tuple[float, float]] = []
    for cost, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or accuracy > front[-1][1]:
            front.append((cost, accuracy))
    return front


def _ablation_lines(
    measured: Sequence[RunGroup], groups: Sequence[RunGroup]
) -> list[tuple[Sequence[RunGroup], dict[str, Any]]]:
    """Arrange the measured groups of an ablation in lines with their styles; a baseline is a star."""
    swept = [group for group in measured if not group.is_baseline]
    styles = series_styles([group for group in groups if not group.is_baseline])
    lines: list[tuple[Sequence[RunGroup], dict[str, Any]]] = []
    for number, compressor in enumerate(sorted({group.compressor for group in swept})):
        for key, style in styles.items():
            line = [g for g in swept if (g.compressor, (g.prefusion_layers, g.settings)) == (compressor, key)]
            face = style["color"] if number % 2 == 0 else "white"
            lines.append((line, {**style, "label": f"{compressor}, {style['label']}", "markerfacecolor": face}))
    star = {"color": BLACK, "marker": "*", "markersize": 9, "linestyle": "none"}
    lines += [([group], star) for group in measured if group.is_baseline]
    return [(line, style) for line, style in lines if line]


def _draw_panel(axis: Axes, measure: CostMeasure, lines: Sequence[tuple[Sequence[RunGroup], dict[str, Any]]]) -> None:
    """Draw lines of run groups, each by rising cost, and the Pareto front of all of them."""
    groups = [group for line, _ in lines for group in line]
    scale, prefix = _display_unit(measure, groups)
    for line, style in lines:
        x, (mean, low, high) = _points(measure, sorted(line, key=measure.value), scale)
        axis.errorbar(x, mean, yerr=(mean - low, high - mean), **style, capsize=2, elinewidth=1)
    x, (mean, *_) = _points(measure, groups, scale)
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
    axis.set_xticks(_round_ticks(*limits))
    axis.set_xlim(*limits)
    axis.set_xlabel(f"Cost of a prompt ({prefix}{measure.name}, log scale)")


def _display_unit(measure: CostMeasure, groups: Iterable[RunGroup]) -> tuple[float, str]:
    return unit(min(measure.value(group) for group in groups), measure.units)


def _points(measure: CostMeasure, groups: Sequence[RunGroup], scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Return costs [groups] and accuracies in percent with their bounds [3, groups]."""
    costs = np.array([measure.value(group) / scale for group in groups])
    return costs, 100 * np.array([group.accuracy for group in groups]).T


def _round_ticks(low: float, high: float) -> list[float]:
    """Return round numbers between two limits: 1, 2, 3, 5 and 7 times powers of ten, or evenly spaced ones."""
    if high < 4 * low:
        return [value for value in MaxNLocator(5).tick_values(low, high) if low <= value <= high]
    powers = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    return [digit * power for power in powers for digit in (1, 2, 3, 5, 7) if low <= digit * power <= high]
