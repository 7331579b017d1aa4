"""Llama 4: an image is padded and cut into square tiles, followed by the whole image squashed to one tile.

Source: transformers' `llama4`. Around the `<|patch|>` tokens of each tile its processor writes

    <|image_start|> tile <|tile_x_separator|> tile <|tile_y_separator|>
    ...
    <|image|> whole image <|image_end|>

and only the last line, after `<|image_start|>`, for an image of a single tile, which is padded and not squashed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import floor, isqrt
from typing import Any

from transformers import PretrainedConfig

from probes.tokens.families.image_boxes import whole_image_boxes
from probes.tokens.families.image_runs import TokenRun, find_image_runs
from probes.tokens.grid import NO_BOX, Box, Grid
from probes.tokens.image_transform import ProcessedImage
from probes.tokens.layout_registry import register_layout
from probes.tokens.model_inputs import ImageSizes, size_of_image


@register_layout("llama4")
def llama4_layout(config: PretrainedConfig, inputs: Mapping[str, Any], sizes: ImageSizes, processor: Any) -> list[Grid]:
    """Return one grid per tile, row by row, and a last one for the whole image; a single tile has no such last one.

    The separators between tiles determine their arrangement. The image is resized without changing its aspect ratio
    and padded at the right and at the bottom to whole tiles, so tiles may exceed it. How far it is enlarged is a setting
    of the image processor. Tiles have boxes only with the processor and the sizes of the images.
    """
    runs = find_image_runs(inputs, config.image_token_id)
    before = [int(inputs["input_ids"][run.row, run.start - 1]) if run.start else -1 for run in runs]
    whole_image_mark = before[-1]  # a batch ends with a whole image
    ends = [index + 1 for index, mark in enumerate(before) if mark == whole_image_mark]
    image_processor = getattr(processor, "image_processor", None)
    boxes = whole_image_boxes(sizes, len(ends))
    grids = []
    for image, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        rows, columns = _tile_rows_and_columns(inputs, runs[start:end])
        size = size_of_image(sizes, image, len(ends))
        tile_boxes = _tile_boxes(size, image_processor, rows, columns, config.vision_config.image_size)
        if len(tile_boxes) > 1:
            tile_boxes.append(boxes[image])
        for tile, (run, box) in enumerate(zip(runs[start:end], tile_boxes, strict=True)):
            side = isqrt(run.stop - run.start)
            grids.append(Grid(image, side, side, box, tile=tile))
    return grids


def _tile_rows_and_columns(inputs: Mapping[str, Any], runs: Sequence[TokenRun]) -> tuple[int, int]:
    """Return the rows and columns of an image's tiles, read from the separators after each tile."""
    if len(runs) == 1:
        return 1, 1
    separators = [int(inputs["input_ids"][run.row, run.stop]) for run in runs[:-1]]
    # A row ends with the separator that ends the last tile.
    row_ends = [index + 1 for index, separator in enumerate(separators) if separator == separators[-1]]
    if row_ends != list(range(row_ends[0], len(separators) + 1, row_ends[0])):
        raise ValueError(f"rows of tiles have unequal lengths: they end after tiles {row_ends} of {len(separators)}")
    return len(row_ends), row_ends[0]


def _tile_boxes(size: tuple[int, int] | None, image_processor: Any, rows: int, columns: int, side: int) -> list[Box]:
    """Return the boxes of an image's tiles in reading order, NO_BOX for each if they are not known."""
    if size is None or image_processor is None:
        return [NO_BOX] * (rows * columns)
    height, width = size
    canvas = rows * side, columns * side
    limits = canvas
    if not image_processor.resize_to_max_canvas:  # enlarged to the side of a tile at most
        limits = min(max(height, side), canvas[0]), min(max(width, side), canvas[1])
    across, down = limits[1] / width, limits[0] / height
    if across < down:
        resized = min(floor(height * across), limits[0]), limits[1]
    else:
        resized = limits[0], min(floor(width * down), limits[1])
    image = ProcessedImage.original(height, width).resize(max(resized[0], 1), max(resized[1], 1))
    padded = image.crop(0, 0, canvas[1], canvas[0])
    return [
        padded.crop(column * side, row * side, (column + 1) * side, (row + 1) * side).box
        for row in range(rows)
        for column in range(columns)
    ]
