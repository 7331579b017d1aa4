"""Rows figure: the accuracy of every row of an experiment."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.report.experiment_results import ExperimentResults, ResultRow, blind_accuracies
from experiments.report.figures.style import (
    BLACK,
    BLUE,
    MEASURED,
    ORANGE,
    REFERENCES,
    WIDTH,
    ReportFigure,
    legend,
    styled,
)
from experiments.report.formatting import format_quantity


@styled
def rows_figure(results: ExperimentResults) -> Figure:
    """Draw the accuracy of each row of an experiment, in the table's order.

    Each row shows its mean with the 95% bootstrap interval over examples and seeds, a small dot for each seed, and the
    FLOPs of a prompt at the right. A row without a finished run shows its status instead. Vertical lines are the first
    row and the blind controls.

    Args:
        results: The experiment's rows with their runs.

    Raises:
        ValueError: if no row is finished.
    """
    if not results.finished_rows:
        raise ValueError(f"no finished row of {results.name} to draw")
    figure = ReportFigure(figsize=(WIDTH, 1.15 + 0.24 * len(results.rows)), layout="constrained")
    axis = figure.subplots()
    heights = {row.number: len(results.rows) - 1 - row.number for row in results.rows}
    y = [heights[row.number] for row in results.finished_rows]
    mean, low, high = 100 * np.asarray([row.runs.accuracy for row in results.finished_rows if row.runs]).T
    bars = {**MEASURED, "linestyle": "none", "capsize": 2, "elinewidth": 1.2}
    axis.errorbar(mean, y, xerr=(mean - low, high - mean), **bars, zorder=3, label="mean over seeds, 95% interval")
    seed_points = [
        (100 * accuracy, heights[row.number] - 0.22)
        for row in results.finished_rows
        for accuracy in row.outcomes.mean(axis=1)
    ]
    if len(seed_points) > len(y):
        dots: dict[str, Any] = {"marker": ".", "color": BLUE, "alpha": 0.45, "linestyle": "none"}
        axis.plot(*zip(*seed_points, strict=True), **dots, label="one seed")
    baseline = results.rows[0]
    lines = [(baseline.label, float(baseline.outcomes.mean()), REFERENCES[0])] if baseline.finished else []
    lines += [(name, v, REFERENCES[1 if "blank" in name else 2]) for name, v in blind_accuracies(results).items()]
    for name, value, style in lines:
        axis.axvline(100 * value, **style, linewidth=1.0, zorder=1.5, label=name)
    axis.set_yticks(list(heights.values()), [row.label for row in results.rows])
    axis.set_ylim(-0.6, len(results.rows) - 0.4)
    axis.tick_params(axis="y", length=0)
    axis.grid(visible=False, axis="y")
    axis.set_xlabel("Accuracy (%)")
    axis.spines["left"].set_visible(False)
    right = axis.twinx()
    right.set_ylim(axis.get_ylim())
    right.set_yticks(list(heights.values()), [_flops_or_status(row) for row in results.rows])
    for label, row in zip(right.get_yticklabels(), results.rows, strict=True):
        label.set_color(BLACK if row.finished else ORANGE)
    right.tick_params(axis="y", length=0)
    right.grid(visible=False)
    right.annotate("FLOPs", (1, 1), (4, 2), xycoords="axes fraction", textcoords="offset points", fontsize=7.5)
    legend(figure, [axis], columns=3)
    return figure


def _flops_or_status(row: ResultRow) -> str:
    return format_quantity(row.runs.flops) if row.runs and row.finished else row.status
