"""Accuracy by row of a study."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from experiments.report.experiment_results import Row, Study, references
from experiments.report.figures.style import BLACK, BLUE, MEASURED, ORANGE, REFERENCES, WIDTH, legend, styled
from experiments.report.formatting import quantity


@styled
def rows_figure(study: Study) -> Figure:
    """One line a row, in the table's order: accuracy with its 95% bootstrap interval over examples and seeds, a small dot
    for each seed, and the FLOPs of a prompt at the right. Vertical lines: the first row, a guess from the text alone, a
    blank picture. A row without a finished cell says why. Raises ValueError without a finished row.
    """
    if not study.finished:
        raise ValueError(f"no finished row of {study.name} to draw")
    figure = Figure(figsize=(WIDTH, 1.15 + 0.24 * len(study.rows)), layout="constrained")
    axis = figure.subplots()
    places = {row.number: len(study.rows) - 1 - row.number for row in study.rows}
    y = [places[row.number] for row in study.finished]
    mean, low, high = 100 * np.asarray([row.cell.accuracy for row in study.finished if row.cell]).T
    bars = {**MEASURED, "linestyle": "none", "capsize": 2, "elinewidth": 1.2}
    axis.errorbar(mean, y, xerr=(mean - low, high - mean), **bars, zorder=3, label="mean of the seeds, 95% interval")
    seeds = [(100 * found, places[row.number] - 0.22) for row in study.finished for found in row.outcomes.mean(axis=1)]
    if len(seeds) > len(y):
        axis.plot(*zip(*seeds, strict=True), marker=".", color=BLUE, alpha=0.45, linestyle="none", label="one seed")
    baseline = study.rows[0]
    lines = [(baseline.label, float(baseline.outcomes.mean()), REFERENCES[0])] if baseline.finished else []
    lines += [(name, value, REFERENCES[1 if "blank" in name else 2]) for name, value in references(study).items()]
    for name, value, style in lines:
        axis.axvline(100 * value, **style, linewidth=1.0, zorder=1.5, label=name)
    axis.set_yticks(list(places.values()), [row.label for row in study.rows])
    axis.set_ylim(-0.6, len(study.rows) - 0.4)
    axis.tick_params(axis="y", length=0)
    axis.grid(visible=False, axis="y")
    axis.set_xlabel("Accuracy (%)")
    axis.spines["left"].set_visible(False)
    right = axis.twinx()
    right.set_ylim(axis.get_ylim())
    right.set_yticks(list(places.values()), [_beside(row) for row in study.rows])
    for label, row in zip(right.get_yticklabels(), study.rows, strict=True):
        label.set_color(BLACK if row.finished else ORANGE)
    right.tick_params(axis="y", length=0)
    right.grid(visible=False)
    right.annotate("FLOPs", (1, 1), (4, 2), xycoords="axes fraction", textcoords="offset points", fontsize=7.5)
    legend(figure, [axis], columns=3)
    return figure


def _beside(row: Row) -> str:
    return quantity(row.cell.flops) if row.cell and row.finished else row.state
