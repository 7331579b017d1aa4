"""Style of all figures: matplotlib settings, colours, and a figure class for notebooks."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import cycle
from typing import Any

from matplotlib.figure import Figure

FIGURE_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "figure.dpi": 120,
    "savefig.dpi": 200,
}
# Okabe and Ito's colours, which differ for any colour vision; markers and dashes distinguish the lines in grey.
GROUP_LINES: dict[str, dict[str, Any]] = {
    "pad": {"color": "#767676", "marker": "x", "linestyle": ":"},
    "system": {"color": "#1a1a1a", "marker": "s", "linestyle": "-."},
    "vision": {"color": "#d55e00", "marker": "o", "linestyle": "-"},
    "instruction": {"color": "#0072b2", "marker": "D", "linestyle": "--"},
    "response": {"color": "#009e73", "marker": "^", "linestyle": (0, (5, 1, 1, 1))},
}
OTHER_COLORS = ("#cc79a7", "#56b4e9", "#e69f00", "#8a6d00")
# Colour maps of values from 0 and of signed values, and the colour of undefined values.
SEQUENTIAL, DIVERGING, UNDEFINED = "YlOrRd", "PuOr_r", "#a6a6a6"


class NotebookFigure(Figure):
    """Figure that a notebook shows by itself, without pyplot."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=FIGURE_STYLE["figure.dpi"])
        return buffer.getvalue()


def line_styles(groups: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the plot arguments of each token group's line."""
    other_colors = cycle(OTHER_COLORS)
    return {
        group: GROUP_LINES.get(group) or {"color": next(other_colors), "marker": "v", "linestyle": "--"}
        for group in groups
    }
