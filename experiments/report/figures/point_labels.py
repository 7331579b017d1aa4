"""Number labels beside the points of a panel, placed without overlaps, and the key that explains the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from experiments.report.figures.style import GREY

FIGURE_SPACE = "\u2007"
"""A space as wide as a digit."""
_LABEL_SIZE = 0.14, 0.11
"""Width and height of a two-digit label in inches."""
_HALF_POINT = 0.25
"""Half the width and height of a point, in label sizes."""
_STEPS = np.arange(-7, 7.25, 0.25)
_OFFSETS = np.stack(np.meshgrid(_STEPS, _STEPS), axis=-1).reshape(-1, 2)
# Nearest first; of equally near offsets the one to the right.
_OFFSETS = _OFFSETS[np.lexsort((_OFFSETS[:, 1], -_OFFSETS[:, 0], np.hypot(*_OFFSETS.T)))]


def number_points(
    axis: Axes, numbers: Sequence[int], x: Float[np.ndarray, " points"], y: Float[np.ndarray, "3 points"]
) -> None:
    """Write a number beside each point of a panel.

    Each number takes the nearest position that covers no point, error bar or other number. A thin line connects a
    distant number with its point.

    Args:
        axis: Panel whose limits are final.
        numbers: Number of each point.
        x: Positions along the x axis.
        y: Means with the lower and upper bounds of their error bars.
    """
    figure = axis.get_figure(root=True)
    assert figure is not None
    box = axis.get_position().size * np.divide(figure.get_size_inches(), _LABEL_SIZE)  # the panel in label sizes

    def to_label_units(heights: np.ndarray) -> np.ndarray:
        return axis.transAxes.inverted().transform(axis.transData.transform(np.stack([x, heights], axis=1))) * box

    points, low, high = map(to_label_units, y)
    bars = np.maximum((high - low) / 2, 0) + _HALF_POINT
    texts = place_labels(points, (low + high) / 2, bars, box)
    for number, text in zip(numbers, texts / box, strict=True):
        axis.text(text[0], text[1], str(number), transform=axis.transAxes, ha="center", va="center", fontsize=6.5)
    for point, text in zip(points, texts, strict=True):
        distance = np.abs(text - point).max()
        if distance > 1.2:
            ends = np.stack([point, text + (point - text) * 0.5 / distance]) / box
            axis.plot(*ends.T, transform=axis.transAxes, color=GREY, linewidth=0.5, zorder=1)


def place_labels(
    points: Float[np.ndarray, "points 2"],
    centres: Float[np.ndarray, "obstacles 2"],
    halves: Float[np.ndarray, "obstacles 2"],
    box: Float[np.ndarray, " 2"],
) -> Float[np.ndarray, "points 2"]:
    """Return the centre of a unit square near each point, inside the box and clear of obstacles and other squares.

    Args:
        points: Points to label, in label sizes.
        centres: Centres of the obstacles.
        halves: Half the width and height of each obstacle.
        box: Width and height of the panel; its lower left corner is (0, 0).
    """
    for point in points:
        candidates = np.clip(point + _OFFSETS, 0.5, box - 0.5)
        clear = (np.abs(candidates[:, None] - centres) >= halves + 0.5).any(axis=-1).all(axis=-1)
        nearest = candidates[np.argmax(clear)]
        centres, halves = np.vstack([centres, nearest]), np.vstack([halves, [0.5, 0.5]])
    return centres[-len(points) :]


def draw_number_key(figure: Figure, labels: Mapping[int, str]) -> None:
    """Write what each number stands for in columns above the panels, and extend the figure by their height."""
    entries = [f"{str(number).rjust(2, FIGURE_SPACE)}  {label}" for number, label in labels.items()]
    columns = max(1, min(4, len(entries), 116 // (max(map(len, entries)) + 3)))
    lines = -(-len(entries) // columns)
    width, height = figure.get_size_inches()
    above = 0.145 * lines + 0.12
    figure.set_size_inches(width, height + above)
    for column in range(columns):
        text = "\n".join(entries[column * lines : (column + 1) * lines])
        position = 0.01 + column / columns, 1 - 0.06 / (height + above)
        figure.text(*position, text, va="top", fontsize=7.5, linespacing=1.3, in_layout=False)
    layout = figure.get_layout_engine()
    assert isinstance(layout, ConstrainedLayoutEngine)
    layout.set(rect=(0, 0, 1, height / (height + above)))
