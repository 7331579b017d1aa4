"""Drawing of the visual tokens of one image or frame over its pixels, one cell each."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection

from probes.tokens.tile_panels import TilePanel

# Opacity of the cells over the image, and of the colour bar.
CELL_OPACITY = 0.75


def draw_background(axis: Axes, pixels: np.ndarray, panel: TilePanel, in_pixels: bool) -> None:
    """Draw a pale grey image if the boxes are in pixels, and set limits that show all of it and all cells."""
    left, top = panel.boxes[:, :2].min(0)
    right, bottom = panel.boxes[:, 2:].max(0)
    if in_pixels:
        height, width = pixels.shape[:2]
        grey = pixels if pixels.ndim == 2 else pixels[..., :3].mean(-1)
        white = 255 if np.issubdtype(pixels.dtype, np.integer) else 1
        axis.imshow(grey, cmap="gray", vmin=-white, vmax=white, extent=(0, width, height, 0))
        left, top, right, bottom = min(left, 0), min(top, 0), max(right, width), max(bottom, height)
    axis.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")


def draw_cells(axis: Axes, panel: TilePanel, colors: Float[np.ndarray, "cells 4"]) -> None:
    """Fill the box of each visual token with its colour."""
    corners = panel.boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2)
    axis.add_collection(
        PolyCollection(list(corners), facecolors=colors, alpha=CELL_OPACITY, edgecolors="white", linewidths=0.2)
    )


def mark_cells(axis: Axes, panel: TilePanel, marked: Bool[np.ndarray, " cells"]) -> None:
    """Draw a cross over the marked visual tokens."""
    boxes = panel.boxes[marked]
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    axis.plot(centres[:, 0], centres[:, 1], linestyle="none", marker="x", color="black", markersize=5)
