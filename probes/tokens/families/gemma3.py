"""Gemma 3: every image is resized to one square; pan and scan appends crops of an elongated image.

Source: transformers' `gemma3`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import ceil, isqrt
from typing import Any

from transformers import PretrainedConfig

from probes.tokens.families.image_boxes import whole_image_boxes
from probes.tokens.families.image_runs import find_image_runs, texts_before_runs
from probes.tokens.grid import NO_BOX, Box, Grid
from probes.tokens.layout_registry import register_layout
from probes.tokens.model_inputs import ImageSizes

# The processor writes the first text between an image and its crops. It writes the second between crops: two tokens
# around a space, which two separate images of a prompt have only if a user typed it.
BEFORE_FIRST_CROP = "and here are some crops to help you see better"
BETWEEN_CROPS = re.compile(r"\S+\n\n \n\n\S+")


@register_layout("gemma3")
def gemma3_layout(config: PretrainedConfig, inputs: Mapping[str, Any], sizes: ImageSizes, processor: Any) -> list[Grid]:
    """Return one grid per image (tile 0) and one per crop (tiles 1, 2, ...).

    The text that the processor writes before crops identifies them, and its tokenizer must decode that text. Without
    the processor, each crop counts as an image.
    """
    crop_counts: list[int] = []  # one per image
    for text in texts_before_runs(inputs, find_image_runs(inputs, config.image_token_id), processor):
        if BEFORE_FIRST_CROP in text or (crop_counts and crop_counts[-1] and BETWEEN_CROPS.fullmatch(text)):
            crop_counts[-1] += 1
        else:
            crop_counts.append(0)
    side = isqrt(config.mm_tokens_per_image)
    boxes = whole_image_boxes(sizes, len(crop_counts))
    return [
        Grid(image, side, side, tile_box, tile=tile)
        for image, (crop_count, box) in enumerate(zip(crop_counts, boxes, strict=True))
        for tile, tile_box in enumerate([box, *_crop_boxes(box, crop_count)])
    ]


def _crop_boxes(box: Box, count: int) -> list[Box]:
    """Return the boxes of an image's crops, side by side along its longer side; the last crop is the remainder."""
    _, _, width, height = box
    if not count or box is NO_BOX:
        return [box] * count
    if width >= height:
        step = ceil(width / count)
        return [(crop * step, 0.0, min((crop + 1) * step, width), height) for crop in range(count)]
    step = ceil(height / count)
    return [(0.0, crop * step, width, min((crop + 1) * step, height)) for crop in range(count)]
