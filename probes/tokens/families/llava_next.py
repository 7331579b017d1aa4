"""LLaVA-NeXT: the whole image, then its tiles stitched to one grid from which padding is removed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PretrainedConfig
from transformers.image_processing_utils import select_best_resolution

from probes.tokens.grid import Grid
from probes.tokens.image_transform import ProcessedImage, resample_edges, stitched_edges
from probes.tokens.layout_registry import register_layout
from probes.tokens.model_inputs import ImageSizes, require_pixels


@register_layout("llava_next")
def llava_next_layout(
    config: PretrainedConfig, inputs: Mapping[str, Any], sizes: ImageSizes, processor: Any
) -> list[Grid]:
    """Return two grids per image: the whole image as tile 0, then the other tiles row by row.

    A newline token ends each row of the stitched grid.
    """
    require_pixels(inputs)
    image_sizes = inputs["image_sizes"].tolist()
    return [grid for image, size in enumerate(image_sizes) for grid in anyres_grids(config, image, size, processor)]


def anyres_grids(
    config: PretrainedConfig, image: int, size: Sequence[int], processor: Any, max_tiles: float = math.inf
) -> list[Grid]:
    """Return the two grids of an image, arranged as `pack_image_features` of transformers does.

    Args:
        config: Config of the model.
        image: Index of the image in the batch.
        size: (height, width) of the original image.
        processor: Processor of the model, or None. Grids have no boxes if it would resize tiles to a size other than
            the input size of the vision tower.
        max_tiles: A stitched grid of more than 1.1^2 times as many tiles is interpolated down to about this many.
    """
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    cells = side // patch  # along a tile
    best = select_best_resolution(tuple(size), config.image_grid_pinpoints)
    tiles_down, tiles_across = best[0] // side, best[1] // side
    if keeps_tile_size(processor, side):
        whole = ProcessedImage.original(size[0], size[1])
    else:
        whole = ProcessedImage(size[0], size[1])
    padded = whole.resize(*fit_within(size, best)).center_pad(*best)
    tiles = [
        [padded.crop(x * side, y * side, (x + 1) * side, (y + 1) * side) for x in range(tiles_across)]
        for y in range(tiles_down)
    ]
    across, down = stitched_edges(tiles, patch)
    tile = torch.arange(tiles_down * tiles_across).view(tiles_down, tiles_across) + 1
    tile = tile.repeat_interleave(cells, 0).repeat_interleave(cells, 1)

    rows, columns = tile.shape
    if size[1] / size[0] > columns / rows:
        padding = (rows - int(round(size[0] * (columns / size[1]), 7))) // 2
        down, tile = down[padding : rows - padding], tile[padding : rows - padding]
    else:
        padding = (columns - int(round(size[1] * (rows / size[0]), 7))) // 2
        across, tile = across[padding : columns - padding], tile[:, padding : columns - padding]

    rows, columns = tile.shape
    ratio = math.sqrt(rows * columns / (max_tiles * cells**2))
    if ratio > 1.1:
        new_rows, new_columns = int(rows // ratio), int(columns // ratio)
        tile = tile[middle_cells(rows, new_rows)][:, middle_cells(columns, new_columns)]
        across, down = resample_edges(across, new_columns), resample_edges(down, new_rows)
    stitched = Grid(image, len(down), len(across), tile=tile, newline=True, edges=(across, down))
    return [whole.resize(side, side).patch_grid(image, patch), stitched]


def fit_within(size: Sequence[int], target: Sequence[int]) -> tuple[int, int]:
    """Return the largest (height, width) of the same aspect ratio within the target, rounded up."""
    down, across = target[0] / size[0], target[1] / size[1]
    if across < down:
        return min(math.ceil(size[0] * across), target[0]), target[1]
    return target[0], min(math.ceil(size[1] * down), target[1])


def middle_cells(cells: int, count: int) -> Int[Tensor, " count"]:
    """Return the index of the cell at the middle of each of `count` equal shares."""
    return ((torch.arange(count) + 0.5) * (cells / count)).long()


def keeps_tile_size(processor: Any, side: int) -> bool:
    """Return whether tiles of `side` x `side` pixels reach the vision tower unchanged; True without a processor."""
    if processor is None:
        return True
    tile = ProcessedImage(side, side, (0, 0, 1, 1))
    return tile.process(processor.image_processor).box == (0, 0, 1, 1)
