"""LLaVA-NeXT: the whole picture, then tiles of it stitched to one grid from which the padding is cut off again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PretrainedConfig
from transformers.image_processing_utils import select_best_resolution

from probes.tokens.grid import Grid, family, pixels_of
from probes.tokens.image_transform import View, edges_of, resample


@family("llava_next")
def llava_next(
    config: PretrainedConfig,
    inputs: Mapping[str, Any],
    sizes: Sequence[tuple[int, int]] | None,
    processor: Any,
) -> list[Grid]:
    """Tile 0 is the whole picture; the others follow row by row. A newline token ends each row of the stitched grid."""
    pixels_of(inputs)
    pictures = inputs["image_sizes"].tolist()
    return [grid for picture, size in enumerate(pictures) for grid in any_res(config, picture, size, processor)]


def any_res(
    config: PretrainedConfig, picture: int, size: Sequence[int], processor: Any, most: float = math.inf
) -> list[Grid]:
    """The two grids of a picture of `size` (height, width), as `pack_image_features` lays them out.

    A stitched grid of more than 1.1^2 times `most` tiles is interpolated down to about that many. The size of a tile is
    that of the vision tower's pictures; boxes are NaN where the processor would resize tiles to another.
    """
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    cells = side // patch  # along a tile
    best = select_best_resolution(tuple(size), config.image_grid_pinpoints)
    tiles_down, tiles_across = best[0] // side, best[1] // side
    whole = View.whole(size[0], size[1]) if keeps_tiles(processor, side) else View(size[0], size[1])
    padded = whole.resize(*fit(size, best)).center_pad(*best)
    tiles = [
        [padded.crop(x * side, y * side, (x + 1) * side, (y + 1) * side) for x in range(tiles_across)]
        for y in range(tiles_down)
    ]
    across, down = edges_of(tiles, patch)
    tile = torch.arange(tiles_down * tiles_across).view(tiles_down, tiles_across) + 1
    tile = tile.repeat_interleave(cells, 0).repeat_interleave(cells, 1)

    rows, columns = tile.shape
    if size[1] / size[0] > columns / rows:
        cut = (rows - int(round(size[0] * (columns / size[1]), 7))) // 2
        down, tile = down[cut : rows - cut], tile[cut : rows - cut]
    else:
        cut = (columns - int(round(size[1] * (rows / size[0]), 7))) // 2
        across, tile = across[cut : columns - cut], tile[:, cut : columns - cut]

    rows, columns = tile.shape
    ratio = math.sqrt(rows * columns / (most * cells**2))
    if ratio > 1.1:
        new_rows, new_columns = int(rows // ratio), int(columns // ratio)
        tile = tile[middles(rows, new_rows)][:, middles(columns, new_columns)]
        across, down = resample(across, new_columns), resample(down, new_rows)
    detail = Grid(picture, len(down), len(across), tile=tile, newline=True, edges=(across, down))
    return [whole.resize(side, side).patches(picture, patch), detail]


def fit(size: Sequence[int], target: Sequence[int]) -> tuple[int, int]:
    """The largest (height, width) of the same shape within the target, rounded up."""
    down, across = target[0] / size[0], target[1] / size[1]
    if across < down:
        return min(math.ceil(size[0] * across), target[0]), target[1]
    return target[0], min(math.ceil(size[1] * down), target[1])


def middles(cells: int, count: int) -> Int[Tensor, " count"]:
    """Which cell holds the middle of each of `count` equal shares."""
    return ((torch.arange(count) + 0.5) * (cells / count)).long()


def keeps_tiles(processor: Any, side: int) -> bool:
    """Whether tiles reach the tower as they were cut, all `side` x `side`; taken for granted without a processor."""
    return processor is None or View(side, side, (0, 0, 1, 1)).process(processor.image_processor).box == (0, 0, 1, 1)
