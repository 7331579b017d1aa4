"""Learning-curve figure: validation accuracy and loss of every row of an experiment during training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from experiments.records.views import Record
from experiments.report.experiment_results import ExperimentResults, ResultRow
from experiments.report.figures.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    LINESTYLES,
    MARKERS,
    ORANGE,
    WIDTH,
    ReportFigure,
    legend,
    styled,
)

_COLOURS = (BLUE, ORANGE, GREEN, BLACK, "#cc79a7", GREY, "#56b4e9")  # Okabe and Ito; seven, so that styles repeat late


class Curve(NamedTuple):
    """A learning curve over the seeds of a row."""

    steps: Int[np.ndarray, " points"]
    values: Float[np.ndarray, "seeds points"]


def rows_with_curves(results: ExperimentResults) -> list[ResultRow]:
    """Return the rows whose finished seeds all have a learning curve."""
    return [row for row in results.finished_rows if row.runs and all(map(_points, row.runs.finished))]


def learning_curve(records: Sequence[Record], measure: str) -> Curve:
    """Return the learning curves of a row's seeds over common steps.

    A seed that ended earlier keeps its last value: that is the model it ended with.

    Args:
        records: One record for each seed, each with a learning curve.
        measure: "accuracy" (0 to 1) or "loss" (nats per token).

    Returns:
        The steps at which any seed was measured, and the value of each seed at its last measurement up to there; the
        first measurement before that.
    """
    curves = [([point["step"] for point in _points(r)], [point[measure] for point in _points(r)]) for r in records]
    steps = np.unique(np.concatenate([steps for steps, _ in curves]))
    values = [np.asarray(v)[np.maximum(np.searchsorted(s, steps, side="right") - 1, 0)] for s, v in curves]
    return Curve(steps, np.stack(values))


@styled
def learning_curves_figure(results: ExperimentResults) -> Figure:
    """Draw validation accuracy and loss against training steps, a line for each row.

    A line is the mean over seeds, its band their range. It ends in a filled marker if training stopped at a plateau or
    after a fixed length, and in an open one if the row was still improving.

    Args:
        results: The experiment's rows with their runs.

    Raises:
        ValueError: if no row has a learning curve.
    """
    rows = rows_with_curves(results)
    if not rows:
        raise ValueError(f"no row of {results.name} has a learning curve")
    figure = ReportFigure(figsize=(WIDTH, 2.6 + 0.16 * -(-len(rows) // 3)), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, measure, scale in zip(axes, ("accuracy", "loss"), (100, 1), strict=True):
        for number, row in enumerate(rows):
            assert row.runs is not None
            curve = learning_curve(row.runs.finished, measure)
            mean = scale * curve.values.mean(axis=0)
            colour = _COLOURS[number % len(_COLOURS)]
            axis.plot(
                curve.steps,
                mean,
                color=colour,
                linestyle=LINESTYLES[number % len(LINESTYLES)],
                marker=MARKERS[number % len(MARKERS)],
                markevery=[-1],
                markersize=6,
                markerfacecolor="white" if row.still_improving else colour,
                label=row.label,
            )
            low, high = scale * curve.values.min(axis=0), scale * curve.values.max(axis=0)
            axis.fill_between(curve.steps, low, high, color=colour, alpha=0.12, linewidth=0)
        axis.set_xlabel("Training steps")
    axes[0].set_ylabel("Validation accuracy (%)")
    axes[1].set_ylabel("Validation loss (nats per token)")
    legend(figure, list(axes), columns=3)
    return figure


def _points(record: Record) -> list[dict[str, float]]:
    return (record.get("train") or {}).get("validation") or []
