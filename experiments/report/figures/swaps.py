"""Swaps figure: which layer reads which property, from minimal pairs whose images are swapped from a layer on."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.records.views import Record
from experiments.report.figures.record_part import require_part
from experiments.report.figures.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    LINESTYLES,
    MARKERS,
    ORANGE,
    REFERENCES,
    legend,
    make_panels,
    styled,
)

_COLOURS = (BLUE, ORANGE, GREEN, BLACK, GREY)


@styled
def swaps_figure(record: Record) -> Figure:
    """Draw the share of the answer's move, and of answers that flip, with the other image after each number of layers.

    Each property that the model answers by has a line; bands are 95% bootstrap intervals over pairs.

    Args:
        record: A finished record with swaps.

    Raises:
        ValueError: If the record holds no swaps.
    """
    swaps = require_part(record, "swaps", "swaps")
    figure, (moved, flipped) = make_panels(2, columns=2, height=3.0, label="Share (%)")
    located = {name: entry for name, entry in swaps["properties"].items() if entry["layer"] is not None}
    for number, (name, entry) in enumerate(located.items()):
        index = number % len(_COLOURS)
        style: dict[str, Any] = {"color": _COLOURS[index], "marker": MARKERS[index], "linestyle": LINESTYLES[index]}
        label = f"{name}: layer {entry['layer']} (95% CI {entry['low']} to {entry['high']})"
        _draw_moved(moved, entry, style | {"label": label})
        flipped.plot(100 * np.array(entry["flipped"]), **style)
    moved.axhline(50, **REFERENCES[2], linewidth=1.1, zorder=1.5, label="half")
    moved.set_title("Move between the two answers", loc="left")
    flipped.set_title("Runs that give the other image's answer", loc="left")
    for axis in (moved, flipped):
        axis.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True))
        axis.set_xlabel("Layers before the other image")
        axis.set_ylim(-5, 105)
        axis.set_xlim(-0.3, record["model"]["layers"] + 0.3)
    legend(figure, [moved], columns=2)
    return figure


def _draw_moved(axis: Axes, entry: dict[str, Any], style: dict[str, Any]) -> None:
    low, mean, high = (100 * np.array(entry[curve]) for curve in ("moved_low", "moved", "moved_high"))
    axis.fill_between(np.arange(len(mean)), low, high, color=style["color"], alpha=0.18, linewidth=0)
    axis.plot(mean, **style)
