"""InternVL: an image is cut into square tiles of the closest aspect ratio, followed by a low-resolution whole image.

Source: transformers' `internvl` and the image processor of its `got_ocr2`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isqrt
from typing import Any

from transformers import PretrainedConfig

from probes.tokens.families.image_boxes import closest_tile_boxes, whole_image_boxes
from probes.tokens.families.image_runs import find_image_runs, texts_before_runs
from probes.tokens.grid import Grid
from probes.tokens.layout_registry import register_layout
from probes.tokens.model_inputs import ImageSizes

# The processor writes this text before each frame of a video.
FRAME_NUMBER = re.compile(r"Frame(\d+): \S+$")


@register_layout("internvl")
def internvl_layout(
    config: PretrainedConfig, inputs: Mapping[str, Any], sizes: ImageSizes, processor: Any
) -> list[Grid]:
    """Return one grid per tile, row by row, and a last one for the whole image; only the last if it is not cut.

    The number of tokens determines the number of tiles, and the aspect ratio of the image their arrangement. Without
    the size of the image, tiles have no box. The text that the processor writes before video frames identifies them,
    and its tokenizer must decode that text. Without the processor, each frame counts as an image.
    """
    tokens_per_tile = config.image_seq_length
    runs = find_image_runs(inputs, config.image_token_id)
    if any((run.stop - run.start) % tokens_per_tile for run in runs):
        lengths = [run.stop - run.start for run in runs]
        raise ValueError(
            f"image tokens come in runs of {lengths}, not multiples of the {tokens_per_tile} tokens of a tile; "
            "do not truncate the inputs"
        )
    frames: list[int] = []
    for text in texts_before_runs(inputs, runs, processor):
        frame_number = FRAME_NUMBER.search(text)
        continues_video = frames and frame_number and int(frame_number[1]) == frames[-1] + 2  # the text counts from 1
        frames.append(frames[-1] + 1 if continues_video else 0)
    boxes = whole_image_boxes(sizes, frames.count(0))
    side, image, grids = isqrt(tokens_per_tile), -1, []
    for run, frame in zip(runs, frames, strict=True):
        image += frame == 0
        tile_count = (run.stop - run.start) // tokens_per_tile
        tile_boxes = [*closest_tile_boxes(boxes[image], tile_count - 1), boxes[image]]
        grids += [Grid(image, side, side, box, frame, tile) for tile, box in enumerate(tile_boxes)]
    return grids
