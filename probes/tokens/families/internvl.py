"""InternVL: a picture cut into square tiles in the shape nearest to its own, then all of it once more, small.

Source: transformers' `internvl` and the image processor of its `got_ocr2`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any

from transformers import PretrainedConfig

from probes.tokens.families.image_runs import image_runs, texts_before, tile_box, whole_boxes
from probes.tokens.grid import Box, Grid, family

# What the processor writes before each frame of a video.
FRAME = re.compile(r"Frame(\d+): \S+$")


@family("internvl")
def internvl(
    config: PretrainedConfig, inputs: Mapping[str, Any], sizes: Sequence[tuple[int, int]] | None, processor: Any
) -> list[Grid]:
    """One grid a tile, row by row, and a last one for the whole picture; only this where the picture is not cut.

    How many tiles there are the tokens tell; how they lie, the shape of the picture: without its size tiles have no
    box. Frames of a video are known by the text that the processor writes before them, which takes its tokenizer to
    read: without the processor each counts as a picture.
    """
    length = config.image_seq_length
    runs = image_runs(inputs, config.image_token_id)
    if any((run.stop - run.start) % length for run in runs):
        raise ValueError(f"a picture's image tokens are no whole number of tiles of {length}: were they cut off?")
    frames: list[int] = []
    for text in texts_before(inputs, runs, processor):
        number = FRAME.search(text)
        follows = frames and number and int(number[1]) == frames[-1] + 2  # it counts from 1
        frames.append(frames[-1] + 1 if follows else 0)
    boxes = whole_boxes(sizes, frames.count(0))
    side, picture, grids = isqrt(length), -1, []
    for run, frame in zip(runs, frames, strict=True):
        picture += frame == 0
        tiles = (run.stop - run.start) // length
        parts = [*_tile_boxes(boxes[picture], tiles - 1), boxes[picture]]
        grids += [Grid(picture, side, side, part, frame, tile) for tile, part in enumerate(parts)]
    return grids


def _tile_boxes(box: Box, count: int) -> list[Box]:
    """The `count` tiles of a picture in the rows and columns whose shape is nearest to that of the picture."""
    _, _, width, height = box
    shapes = [(count // columns, columns) for columns in range(1, count + 1) if count % columns == 0]
    if not shapes:
        return []
    rows, columns = min(shapes, key=lambda shape: abs(width / height - shape[1] / shape[0]))
    return [tile_box(box, rows, columns, tile) for tile in range(count)]
