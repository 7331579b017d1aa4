"""Idefics3 and SmolVLM: an image is cut into square tiles, followed by the whole image at low resolution.

Source: transformers' `idefics3` and `smolvlm`. Around the image tokens their processors write

    <fake_token_around_image><row_1_col_1> tile <fake_token_around_image><row_1_col_2> tile \\n
    ...
    \\n <fake_token_around_image><global-img> whole image <fake_token_around_image>

and only the last line for an image that is not cut.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any

from transformers import PretrainedConfig

from probes.tokens.families.image_boxes import tile_box, whole_image_boxes
from probes.tokens.families.image_runs import TokenRun, find_image_runs, texts_before_runs
from probes.tokens.grid import Grid
from probes.tokens.layout_registry import register_layout
from probes.tokens.model_inputs import ImageSizes

# SmolVLM's processor writes the first text before each frame of a video, and the second before the first frame.
FRAME_TIMESTAMP = re.compile(r"\nFrame from \d+:\d+:\S+$")
VIDEO_INTRODUCTION = "You are provided the following series of"


@register_layout("idefics3", "smolvlm")
def idefics3_layout(
    config: PretrainedConfig, inputs: Mapping[str, Any], sizes: ImageSizes, processor: Any
) -> list[Grid]:
    """Return one grid per tile, row by row, and a last one for the whole image.

    The text between tiles determines their arrangement, so no processor is needed. The image is resized to whole
    tiles without keeping its aspect ratio. SmolVLM does not cut video frames; the text that its processor writes
    before them identifies them. Without the processor, each frame counts as an image.
    """
    runs = find_image_runs(inputs, config.image_token_id)
    marks = [tuple(inputs["input_ids"][run.row, max(run.start - 2, 0) : run.start].tolist()) for run in runs]
    whole_image_mark = marks[-1]  # a batch ends with a whole image
    if any(len(mark) < 2 or mark[0] != whole_image_mark[0] for mark in marks):
        raise ValueError(
            f"image tokens lack the two marker tokens before each tile; pass inputs of a {config.model_type} processor"
        )
    ends = [index + 1 for index, mark in enumerate(marks) if mark == whole_image_mark]
    runs_per_image = [runs[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    texts = texts_before_runs(inputs, runs, processor)
    frames: list[int] = []
    for start in [0, *ends[:-1]]:
        continues_video = frames and FRAME_TIMESTAMP.search(texts[start]) and VIDEO_INTRODUCTION not in texts[start]
        frames.append(frames[-1] + 1 if continues_video else 0)
    boxes = whole_image_boxes(sizes, frames.count(0))
    grids, image = [], -1
    for tile_runs, frame in zip(runs_per_image, frames, strict=True):
        image += frame == 0
        rows, columns = _tile_rows_and_columns(tile_runs)
        tile_boxes = [tile_box(boxes[image], rows, columns, tile) for tile in range(rows * columns)]
        for tile, (run, box) in enumerate(zip(tile_runs, [*tile_boxes, boxes[image]], strict=True)):
            side = isqrt(run.stop - run.start)
            grids.append(Grid(image, side, side, box, frame, tile))
    return grids


def _tile_rows_and_columns(runs: Sequence[TokenRun]) -> tuple[int, int]:
    """Return the rows and columns of tiles, read from the gaps between runs.

    A gap of more than two marker tokens occurs only at the end of a row of tiles.
    """
    row_ends = [index for index in range(1, len(runs)) if runs[index].start - runs[index - 1].stop > 2]
    if not row_ends:
        return 0, 0
    columns = row_ends[0]
    if row_ends != list(range(columns, len(runs), columns)):
        raise ValueError(f"rows of tiles have unequal lengths: they end after tiles {row_ends} of {len(runs)}")
    return len(row_ends), columns
