"""Claims figure: the statistic of every claim with its interval and its line."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.report.claims.answers import DOES_NOT_HOLD, HOLDS, UNDECIDED
from experiments.report.claims.registry import Finding
from experiments.report.figures.style import BLACK, GREEN, GREY, ORANGE, WIDTH, ReportFigure, legend, styled

_STYLES: dict[str, dict[str, Any]] = {
    HOLDS: {"color": GREEN, "marker": "o"},
    DOES_NOT_HOLD: {"color": ORANGE, "marker": "s"},
    UNDECIDED: {"color": GREY, "marker": "D", "markerfacecolor": "white"},
}
_UNITS = {"share": "Share (%)", "difference": "Difference of accuracy (percentage points)"}
_LABEL_CHARACTERS = 48
_LINE_HEIGHT = 0.16
"""Height of a line of a label in inches."""


@styled
def claims_figure(findings: Sequence[Finding]) -> Figure:
    """Draw the value of each claim with its 95% interval, and the line above which it holds.

    Shares are in the upper panel, differences of accuracy in the lower. Shape and colour of a point show the answer.

    Args:
        findings: The claims' answers; claims without a value are left out.

    Raises:
        ValueError: if no claim has a value.
    """
    drawn = {unit: [f for f in findings if f.claim.unit == unit and not np.isnan(f.estimate.value)] for unit in _UNITS}
    drawn = {unit: rows for unit, rows in drawn.items() if rows}
    if not drawn:
        raise ValueError("claims: no claim has a value to draw")
    heights = [len(rows) for rows in drawn.values()]
    labels = [_label(finding, rows) for rows in drawn.values() for finding in rows]
    row_height = _LINE_HEIGHT * max(2, *(label.count("\n") + 1 for label in labels))
    # Axis labels and the legend take the height of about three rows.
    size = (WIDTH, row_height * (sum(heights) + 1.4 * len(heights) + 1))
    figure = ReportFigure(figsize=size, layout="constrained")
    axes = list(figure.subplots(len(drawn), 1, squeeze=False, height_ratios=heights)[:, 0])
    for axis, (unit, rows) in zip(axes, drawn.items(), strict=True):
        _draw_rows(axis, rows)
        axis.set_xlabel(_UNITS[unit])
    legend(figure, axes, columns=4)
    return figure


def _draw_rows(axis: Axes, rows: Sequence[Finding]) -> None:
    for number, finding in enumerate(rows):
        estimate = finding.estimate
        value, low, high = (100 * bound for bound in (estimate.value, estimate.low, estimate.high))
        axis.errorbar(
            value,
            number,
            xerr=[[value - low], [high - value]],
            linestyle="none",
            capsize=2,
            elinewidth=1,
            label=estimate.answer,
            **_STYLES[estimate.answer],
        )
        line = 100 * finding.claim.line
        axis.plot([line, line], [number - 0.4, number + 0.4], color=BLACK, linewidth=1.1, label="line of the claim")
    axis.set_yticks(range(len(rows)), [_label(finding, rows) for finding in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.tick_params(axis="y", length=0)
    axis.grid(visible=False, axis="y")


def _label(finding: Finding, rows: Sequence[Finding]) -> str:
    """Return the statement; of a claim with several rows also the model, and the statement at the first of them alone."""
    same = [other for other in rows if other.claim.key == finding.claim.key]
    lines = textwrap.wrap(finding.claim.statement, _LABEL_CHARACTERS, max_lines=2, placeholder=" ...")
    if len(same) == 1:
        return "\n".join(lines)
    model = textwrap.shorten(finding.model, _LABEL_CHARACTERS + 2, placeholder=" ...")
    return "\n".join([*(lines if same[0] is finding else []), f"({model})"])
