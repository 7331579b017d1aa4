"""Numbers beside the points of a panel, set apart so that each can be read, and the key that says what they number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from experiments.report.figures.style import GREY

FIGURE_SPACE = "\u2007"
"""As wide as a digit."""
_SIZE = 0.14, 0.11
"""Inches that two digits take."""
_POINT = 0.25
"""Half of a point's width and height, in numbers' sizes."""
_STEPS = np.arange(-7, 7.25, 0.25)
_PLACES = np.stack(np.meshgrid(_STEPS, _STEPS), axis=-1).reshape(-1, 2)
# Nearest first, of equals the one to the right.
_PLACES = _PLACES[np.lexsort((_PLACES[:, 1], -_PLACES[:, 0], np.hypot(*_PLACES.T)))]


def number_points(
    axis: Axes, numbers: Sequence[int], x: Float[np.ndarray, " points"], y: Float[np.ndarray, "3 points"]
) -> None:
    """Write a number beside each point of a panel whose limits are set; `y` are means with the bounds of their bars.

    Each takes the nearest place that covers no point, bar or other number; a thin line leads to one that is far.
    """
    figure = axis.get_figure(root=True)
    assert figure is not None
    box = axis.get_position().size * np.divide(figure.get_size_inches(), _SIZE)  # the panel in numbers' sizes

    def placed(heights: np.ndarray) -> np.ndarray:
        return axis.transAxes.inverted().transform(axis.transData.transform(np.stack([x, heights], axis=1))) * box

    points, low, high = map(placed, y)
    bars = np.maximum((high - low) / 2, 0) + _POINT
    texts = spread(points, (low + high) / 2, bars, box)
    for number, text in zip(numbers, texts / box, strict=True):
        axis.text(text[0], text[1], str(number), transform=axis.transAxes, ha="center", va="center", fontsize=6.5)
    for point, text in zip(points, texts, strict=True):
        far = np.abs(text - point).max()
        if far > 1.2:
            ends = np.stack([point, text + (point - text) * 0.5 / far]) / box
            axis.plot(*ends.T, transform=axis.transAxes, color=GREY, linewidth=0.5, zorder=1)


def spread(
    points: Float[np.ndarray, "points 2"],
    centres: Float[np.ndarray, "obstacles 2"],
    halves: Float[np.ndarray, "obstacles 2"],
    box: Float[np.ndarray, " 2"],
) -> Float[np.ndarray, "points 2"]:
    """A centre for a square of side 1 near each point, within the box from (0, 0) and clear of obstacles and the others."""
    for point in points:
        places = np.clip(point + _PLACES, 0.5, box - 0.5)
        clear = (np.abs(places[:, None] - centres) >= halves + 0.5).any(axis=-1).all(axis=-1)
        place = places[np.argmax(clear)]
        centres, halves = np.vstack([centres, place]), np.vstack([halves, [0.5, 0.5]])
    return centres[-len(points) :]


def number_key(figure: Figure, rows: Mapping[int, str]) -> None:
    """What the numbers stand for, in columns above the panels; the figure grows by their height."""
    entries = [f"{str(number).rjust(2, FIGURE_SPACE)}  {label}" for number, label in rows.items()]
    columns = max(1, min(4, len(entries), 116 // (max(map(len, entries)) + 3)))
    lines = -(-len(entries) // columns)
    width, height = figure.get_size_inches()
    above = 0.145 * lines + 0.12
    figure.set_size_inches(width, height + above)
    for column in range(columns):
        text = "\n".join(entries[column * lines : (column + 1) * lines])
        place = 0.01 + column / columns, 1 - 0.06 / (height + above)
        figure.text(*place, text, va="top", fontsize=7.5, linespacing=1.3, in_layout=False)
    layout = figure.get_layout_engine()
    assert isinstance(layout, ConstrainedLayoutEngine)
    layout.set(rect=(0, 0, 1, height / (height + above)))
