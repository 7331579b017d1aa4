"""Aya Vision: an image is cut into square tiles of the closest aspect ratio, followed by a low-resolution whole image.

Source: transformers' `aya_vision` and the image processor of its `got_ocr2`. The processor writes `TILE_1`, `TILE_2`,
... before the tiles, and `TILE_GLOBAL` before the whole image.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any

from transformers import PretrainedConfig

from probes.tokens.families.image_boxes import closest_tile_boxes, whole_image_boxes
from probes.tokens.families.image_runs import find_image_runs
from probes.tokens.grid import Grid
from probes.tokens.layout_registry import register_layout
from probes.tokens.model_inputs import ImageSizes


@register_layout("aya_vision")
def aya_vision_layout(
    config: PretrainedConfig, inputs: Mapping[str, Any], sizes: ImageSizes, processor: Any
) -> list[Grid]:
    """Return one grid per tile, row by row, and a last one for the whole image; only the last if it is not cut.

    The token before each tile identifies the whole image. Without the size of the image, tiles have no box.
    """
    runs = find_image_runs(inputs, config.image_token_id)
    before = [int(inputs["input_ids"][run.row, run.start - 1]) if run.start else -1 for run in runs]
    whole_image_mark = before[-1]  # a batch ends with a whole image
    ends = [index + 1 for index, mark in enumerate(before) if mark == whole_image_mark]
    boxes = whole_image_boxes(sizes, len(ends))
    grids = []
    for image, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        tile_boxes = [*closest_tile_boxes(boxes[image], end - start - 1), boxes[image]]
        for tile, (run, box) in enumerate(zip(runs[start:end], tile_boxes, strict=True)):
            side = isqrt(run.stop - run.start)
            grids.append(Grid(image, side, side, box, tile=tile))
    return grids
