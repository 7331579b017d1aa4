"""Gemma 3: every picture squashed to one square; with pan and scan, crops of a long one follow it.

Source: transformers' `gemma3`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import ceil, isqrt
from typing import Any

from transformers import PretrainedConfig

from probes.tokens.families.image_runs import image_runs, texts_before, whole_boxes
from probes.tokens.grid import NO_BOX, Box, Grid, family

# What the processor writes between a picture and its crops, and between these: two tokens around a space, which two
# pictures of a prompt have only if it was typed.
CROPS_FOLLOW = "and here are some crops to help you see better"
NEXT_CROP = re.compile(r"\S+\n\n \n\n\S+")


@family("gemma3")
def gemma3(
    config: PretrainedConfig, inputs: Mapping[str, Any], sizes: Sequence[tuple[int, int]] | None, processor: Any
) -> list[Grid]:
    """One grid a picture (tile 0), and one for each of its crops (tiles 1, 2, ...).

    Crops are known by the text that the processor writes before them, which takes its tokenizer to read: without the
    processor each crop counts as a picture.
    """
    crops: list[int] = []  # of each picture
    for text in texts_before(inputs, image_runs(inputs, config.image_token_id), processor):
        if CROPS_FOLLOW in text or (crops and crops[-1] and NEXT_CROP.fullmatch(text)):
            crops[-1] += 1
        else:
            crops.append(0)
    side = isqrt(config.mm_tokens_per_image)
    return [
        Grid(picture, side, side, part, tile=tile)
        for picture, (count, box) in enumerate(zip(crops, whole_boxes(sizes, len(crops)), strict=True))
        for tile, part in enumerate([box, *_crop_boxes(box, count)])
    ]


def _crop_boxes(box: Box, count: int) -> list[Box]:
    """The crops of a picture: side by side along its longer side, the last one what is left."""
    _, _, width, height = box
    if not count or box is NO_BOX:
        return [box] * count
    if width >= height:
        step = ceil(width / count)
        return [(crop * step, 0.0, min((crop + 1) * step, width), height) for crop in range(count)]
    step = ceil(height / count)
    return [(0.0, crop * step, width, min((crop + 1) * step, height)) for crop in range(count)]
