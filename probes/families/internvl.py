"""InternVL: a picture cut into square tiles in the shape nearest to its own, then all of it once more, small.

Source: transformers' `internvl` and the image processor of its `got_ocr2`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any

from transformers import PretrainedConfig

from probes.families.pictures import image_runs, tile_box, whole_boxes
from probes.places import Box, Grid, family


@family("internvl")
def internvl(
    config: PretrainedConfig, inputs: Mapping[str, Any], sizes: Sequence[tuple[int, int]] | None, processor: Any
) -> list[Grid]:
    """One grid a tile, row by row, and a last one for the whole picture; only this where the picture is not cut.

    How many tiles there are the tokens tell; how they lie, the shape of the picture: without its size tiles have no
    box. A frame of a video is a picture of its own: the inputs do not tell them apart.
    """
    length = config.image_seq_length
    runs = image_runs(inputs, config.image_token_id)
    if any((run.stop - run.start) % length for run in runs):
        raise ValueError(f"a picture's image tokens are no whole number of tiles of {length}: were they cut off?")
    tiles = [(run.stop - run.start) // length for run in runs]
    side = isqrt(length)
    return [
        Grid(picture, side, side, part, tile=tile)
        for picture, (count, box) in enumerate(zip(tiles, whole_boxes(sizes, len(runs)), strict=True))
        for tile, part in enumerate([*_tile_boxes(box, count - 1), box])
    ]


def _tile_boxes(box: Box, count: int) -> list[Box]:
    """The `count` tiles of a picture in the rows and columns whose shape is nearest to that of the picture."""
    _, _, width, height = box
    shapes = [(count // columns, columns) for columns in range(1, count + 1) if count % columns == 0]
    if not shapes:
        return []
    rows, columns = min(shapes, key=lambda shape: abs(width / height - shape[1] / shape[0]))
    return [tile_box(box, rows, columns, tile) for tile in range(count)]
