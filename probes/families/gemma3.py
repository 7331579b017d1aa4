"""Gemma 3: every picture squashed to one square; with pan and scan, crops of a long one follow it.

Source: transformers' `gemma3`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import ceil, isqrt
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import PretrainedConfig

from probes.families.pictures import Run, image_runs, whole_boxes
from probes.places import NO_BOX, Box, Grid, family

# What the processor writes between a picture and its crops.
CROPS_FOLLOW = "and here are some crops to help you see better"


@family("gemma3")
def gemma3(
    config: PretrainedConfig, inputs: Mapping[str, Any], sizes: Sequence[tuple[int, int]] | None, processor: Any
) -> list[Grid]:
    """One grid a picture (tile 0), and one for each of its crops (tiles 1, 2, ...).

    Crops are known by the text that the processor writes before them, which takes its tokenizer to read: without the
    processor each crop counts as a picture.
    """
    runs = image_runs(inputs, config.image_token_id)
    crops = [0] * len(runs) if processor is None else _count_crops(runs, inputs["input_ids"], processor.tokenizer)
    side = isqrt(config.mm_tokens_per_image)
    return [
        Grid(picture, side, side, part, tile=tile)
        for picture, (count, box) in enumerate(zip(crops, whole_boxes(sizes, len(crops)), strict=True))
        for tile, part in enumerate([box, *_crop_boxes(box, count)])
    ]


def _count_crops(runs: Sequence[Run], input_ids: Int[Tensor, "batch positions"], tokenizer: Any) -> list[int]:
    """How many crops follow each picture."""
    # One crop is parted from the next by a space, a picture from the next by what the prompt says.
    between_crops = f"{tokenizer.eoi_token}\n\n \n\n{tokenizer.boi_token}"
    crops = [0]
    for before, run in pairwise(runs):
        text = tokenizer.decode(input_ids[run.row, before.stop : run.start]) if run.row == before.row else ""
        if CROPS_FOLLOW in text or (crops[-1] and text == between_crops):
            crops[-1] += 1
        else:
            crops.append(0)
    return crops


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
