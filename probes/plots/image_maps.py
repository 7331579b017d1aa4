"""Heat maps of one value for each visual token, over the image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
import torch
from jaxtyping import Bool, Float
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from probes.plots.cells import CELL_OPACITY, draw_background, draw_cells, mark_cells
from probes.plots.style import DIVERGING, FIGURE_STYLE, SEQUENTIAL, UNDEFINED, NotebookFigure
from probes.tokens.tile_panels import find_tile_panels
from probes.tokens.token_map import TokenMap


@matplotlib.rc_context(FIGURE_STYLE)
def plot_patches(
    pixels: Any,
    tokens: TokenMap,
    maps: Mapping[str, Float[Tensor, " positions"]],
    sample: int = 0,
    image: int = 0,
    frame: int = 0,
    label: str = "",
    marked: Mapping[str, Bool[Tensor, " positions"]] | None = None,
) -> Figure:
    """Plot the image, and maps of one value for each visual token over it, all on one colour scale.

    The scale starts at 0, or is symmetric around 0 if there are negative values. Undefined values are grey. Tiles that
    overlap, such as an image's overview and its details, get a panel each. Maps are drawn beside the image, as rows and
    columns of tokens, if the boxes of the tokens are not known or all tokens share one box.

    Args:
        pixels: This image or frame: a PIL image, or an array `[height, width, channels]`.
        tokens: A map whose `places` are known.
        maps: Values at all positions of the sample, `[positions]`, by title, such as
            `{"layer 2": attention.received[2, 0].mean(0)[0]}`.
        sample: Row of the batch.
        image: Number of the image in the sample, from 0.
        frame: Frame of a video, from 0.
        label: Label of the colour scale: what the values are, and their unit.
        marked: Positions to draw a cross over, `[positions]`, by title of a map, such as the attention sinks
            `{"layer 2": sinks.by_attention[2, 0]}`.

    Returns:
        Figure with the image and a panel for each map.

    Raises:
        ValueError: Places are not known, there is no such image or frame, a map does not have one value for each
            position, or `marked` has a title of no map.

    Example:
        >>> placed = TokenMap.from_inputs(model, inputs, processor, [image])
        >>> values = torch.arange(placed.labels.shape[1])
        >>> figure = plot_patches(image, placed, {"position": values}, label="Position in the prompt")
    """
    panels, in_pixels = find_tile_panels(tokens, sample, image, frame)
    values = {title: torch.as_tensor(part).detach().float().cpu() for title, part in maps.items()}
    marks = {title: torch.as_tensor(part).cpu() for title, part in (marked or {}).items()}
    if unknown := sorted(set(marks) - set(values)):
        raise ValueError(f"marked has {unknown[0]!r}: the maps are {', '.join(map(repr, values))}")
    length = tokens.labels.shape[1]
    for title, part in (*values.items(), *marks.items()):
        if part.shape != (length,):
            raise ValueError(f"map {title!r} has shape {list(part.shape)}: one value for each of {length} positions")
    if not values:
        raise ValueError("no map to draw: give at least one, by title")
    drawn_values = torch.cat([part[panel.positions] for part in values.values() for panel in panels]).numpy()
    finite = drawn_values[np.isfinite(drawn_values)]
    largest = float(np.abs(finite).max()) if finite.size else 1.0
    signed = bool((finite < 0).any())
    norm = Normalize(-largest if signed else 0.0, largest or 1.0)
    colors = matplotlib.colormaps[DIVERGING if signed else SEQUENTIAL].with_extremes(bad=UNDEFINED)

    titled_panels = [(title, panel) for title in values for panel in panels]
    # One panel a map: the maps follow the image, row by row. Several: a row for each map, after the image's column.
    one_panel = len(panels) == 1
    columns = min(len(titled_panels) + 1, 4) if one_panel else len(panels) + 1
    rows = -(-(len(titled_panels) + 1) // columns) if one_panel else len(values)
    pixels = np.asarray(pixels)
    aspect = min(max(pixels.shape[0] / pixels.shape[1], 0.4), 2.5)
    figure = NotebookFigure(figsize=(1.95 * columns + 0.6, (1.95 * aspect + 0.3) * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    axes[0, 0].imshow(pixels, cmap="gray")
    axes[0, 0].set_title(f"sample {sample}", loc="left")
    map_axes = axes.ravel()[1:] if one_panel else axes[:, 1:].ravel()
    for axis, (title, panel) in zip(map_axes, titled_panels, strict=False):
        draw_background(axis, pixels, panel, in_pixels)
        draw_cells(axis, panel, colors(norm(values[title][panel.positions].numpy())))
        if title in marks:
            mark_cells(axis, panel, marks[title][panel.positions].numpy())
        axis.set_title(title if one_panel else f"{title}, {panel.name}", loc="left")
    for axis in axes.flat:
        axis.set_axis_off()
    figure.colorbar(ScalarMappable(norm, colors), ax=list(axes.flat), shrink=0.8, label=label, alpha=CELL_OPACITY)
    return figure
