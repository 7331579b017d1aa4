"""Panels that show the visual tokens of one image or frame over its pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int

from probes.tokens.token_map import TokenMap


@dataclass(frozen=True)
class TilePanel:
    """Visual tokens of tiles that do not overlap.

    Attributes:
        name: Tile number or numbers, such as "tiles 0 to 3".
        positions: Position of each token in its row of the batch.
        boxes: Left, top, right, bottom of each token, in pixels of the image or in columns and rows of tokens.
        columns, rows: Tokens across and down.
    """

    name: str
    positions: Int[torch.Tensor, " cells"]
    boxes: Float[np.ndarray, "cells 4"]
    columns: int
    rows: int


def find_tile_panels(tokens: TokenMap, sample: int, image: int, frame: int) -> tuple[list[TilePanel], bool]:
    """Group the tiles of one image or frame into panels in which no tiles overlap.

    Returns:
        The panels, and whether their boxes are pixels of the image rather than columns and rows of tokens.

    Raises:
        ValueError: The positions of visual tokens in the image are not known, or there is no such image or frame.
    """
    places = tokens.require_places()
    chosen = (places.image[sample] == image) & (places.frame[sample] == frame) & (places.column[sample] >= 0)
    positions = chosen.nonzero().flatten().cpu()
    if not len(positions):
        count = int(places.image[sample].max()) + 1
        raise ValueError(f"sample {sample} has no frame {frame} of image {image}: it has {count} images, from 0")
    row, column, tile, box = (
        getattr(places, name)[sample].cpu()[positions] for name in ("row", "column", "tile", "box")
    )
    # Tokens that all stand for the whole image would cover each other, so they too are drawn by row and column.
    in_pixels = bool(box.isfinite().all()) and len(box.unique(dim=0)) == len(box)
    if not in_pixels:
        box = torch.stack([column, row, column + 1, row + 1], -1).float()
    tile_edges = {
        number: (box[tile == number, :2].amin(0), box[tile == number, 2:].amax(0)) for number in tile.unique().tolist()
    }
    slack = 0.5 * (box[:, 2:] - box[:, :2]).amin(0)  # tiles may share an edge, up to rounding

    def overlap(first: int, second: int) -> bool:
        (first_start, first_end), (second_start, second_end) = tile_edges[first], tile_edges[second]
        shared = torch.minimum(first_end, second_end) - torch.maximum(first_start, second_start)
        return bool((shared > slack).all())

    groups: list[list[int]] = []
    for number in tile_edges:
        fitting = [group for group in groups if not any(overlap(number, member) for member in group)]
        if fitting:
            fitting[0].append(number)
        else:
            groups.append([number])
    panels = []
    for group in groups:
        in_group = torch.isin(tile, torch.tensor(group))
        name = f"tile {group[0]}" if len(group) == 1 else f"tiles {group[0]} to {group[-1]}"
        columns, rows = (box[in_group, side].unique().numel() for side in (0, 1))
        panels.append(TilePanel(name, positions[in_group], box[in_group].numpy(), columns, rows))
    return panels, in_pixels
