"""Idefics3 and SmolVLM: a picture cut into square tiles, then all of it once more, small.

Source: transformers' `idefics3` and `smolvlm`. Around the image tokens their processors write

    <fake_token_around_image><row_1_col_1> tile <fake_token_around_image><row_1_col_2> tile \\n
    ...
    \\n <fake_token_around_image><global-img> whole picture <fake_token_around_image>

and only the last line for a picture that is not cut.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any

from transformers import PretrainedConfig

from probes.tokens.families.image_runs import Run, image_runs, texts_before, tile_box, whole_boxes
from probes.tokens.grid import Grid, family

# What SmolVLM's processor writes before each frame of a video, and before the first.
FRAME = re.compile(r"\nFrame from \d+:\d+:\S+$")
VIDEO = "You are provided the following series of"


@family("idefics3", "smolvlm")
def idefics3(
    config: PretrainedConfig, inputs: Mapping[str, Any], sizes: Sequence[tuple[int, int]] | None, processor: Any
) -> list[Grid]:
    """One grid a tile, row by row, and a last one for the whole picture.

    The tiles are read off the text between them, so no processor is needed. The picture is resized to whole tiles,
    sides apart. Frames of a SmolVLM video, which are not cut, are known by the text that its processor writes before
    them: without the processor each counts as a picture.
    """
    runs = image_runs(inputs, config.image_token_id)
    marks = [tuple(inputs["input_ids"][run.row, max(run.start - 2, 0) : run.start].tolist()) for run in runs]
    last = marks[-1]  # a batch ends on a whole picture
    if any(len(mark) < 2 or mark[0] != last[0] for mark in marks):
        raise ValueError("image tokens without the two marks before each tile: are these inputs of this family?")
    ends = [index + 1 for index, mark in enumerate(marks) if mark == last]
    pictures = [runs[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    texts = texts_before(inputs, runs, processor)
    frames: list[int] = []
    for start in [0, *ends[:-1]]:
        follows = frames and FRAME.search(texts[start]) and VIDEO not in texts[start]
        frames.append(frames[-1] + 1 if follows else 0)
    boxes = whole_boxes(sizes, frames.count(0))
    grids, picture = [], -1
    for tiles, frame in zip(pictures, frames, strict=True):
        picture += frame == 0
        rows, columns = _cut(tiles)
        parts = [tile_box(boxes[picture], rows, columns, tile) for tile in range(rows * columns)]
        for tile, (run, part) in enumerate(zip(tiles, [*parts, boxes[picture]], strict=True)):
            side = isqrt(run.stop - run.start)
            grids.append(Grid(picture, side, side, part, frame, tile))
    return grids


def _cut(tiles: Sequence[Run]) -> tuple[int, int]:
    """Rows and columns of tiles: only at the end of a row of tiles stands more than two marks before the next."""
    ends = [index for index in range(1, len(tiles)) if tiles[index].start - tiles[index - 1].stop > 2]
    if not ends:
        return 0, 0
    columns = ends[0]
    if ends != list(range(columns, len(tiles), columns)):
        raise ValueError(f"rows of unequal numbers of tiles end after {ends}: are these inputs of this family?")
    return len(ends), columns
