"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: pictures of any size, patches merged two by two, videos two frames a time.

Source: transformers' `qwen2_vl`, `qwen2_5_vl` and `qwen3_vl`, whose processors leave `image_grid_thw` and
`video_grid_thw` (patches over time, height and width) in the inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from transformers import PretrainedConfig

from probes.tokens.families.image_runs import whole_boxes
from probes.tokens.grid import Grid, family, reading_order


@family("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
def qwen_vl(
    config: PretrainedConfig, inputs: Mapping[str, Any], sizes: Sequence[tuple[int, int]] | None, processor: Any
) -> list[Grid]:
    """One grid a picture, and of a video one for each of its temporal patches, which `frame` counts.

    A temporal patch covers `vision_config.temporal_patch_size` of the frames that were sampled. Qwen3-VL writes the
    time before each of them: these are text. A picture is resized to whole patches, sides apart, so its tokens cover
    all of it. `sizes` count images and videos alike, in reading order.
    """
    merge = config.vision_config.spatial_merge_size
    shapes = {}  # of the images and of the videos: temporal patches, rows and columns of tokens
    for token, name in ((config.image_token_id, "image_grid_thw"), (config.video_token_id, "video_grid_thw")):
        patches = [] if inputs.get(name) is None else inputs[name].tolist()
        shapes[token] = [(frames, height // merge, width // merge) for frames, height, width in patches]
    lengths = {token: [prod(shape) for shape in shapes[token]] for token in shapes}
    pictures = [shapes[token][number] for token, number in reading_order(inputs, lengths)]
    boxes = whole_boxes(sizes, len(pictures))
    return [
        Grid(picture, rows, columns, boxes[picture], frame)
        for picture, (frames, rows, columns) in enumerate(pictures)
        for frame in range(frames)
    ]
