"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5: images of any size, patches merged 2 x 2, and video frames merged in pairs.

Source: transformers' `qwen2_vl`, `qwen2_5_vl`, `qwen3_vl` and `qwen3_5`. Their processors add `image_grid_thw` and
`video_grid_thw` (patches over time, height and width) to the inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from transformers import PretrainedConfig

from probes.tokens.families.image_boxes import whole_image_boxes
from probes.tokens.grid import Grid
from probes.tokens.layout_registry import register_layout
from probes.tokens.model_inputs import ImageSizes, reading_order


@register_layout("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
def qwen_vl_layout(
    config: PretrainedConfig, inputs: Mapping[str, Any], sizes: ImageSizes, processor: Any
) -> list[Grid]:
    """Return one grid per image, and one per temporal patch of a video, which `frame` counts.

    A temporal patch covers `vision_config.temporal_patch_size` of the sampled frames. Qwen3-VL and Qwen3.5 write a
    timestamp before each of them; these tokens are text. The processor resizes an image to whole patches without keeping its
    aspect ratio, so the tokens cover the whole image. `sizes` count images and videos together, in reading order.
    """
    merge = config.vision_config.spatial_merge_size
    shapes = {}  # by visual token id: temporal patches, token rows and token columns of each image or video
    for token, name in ((config.image_token_id, "image_grid_thw"), (config.video_token_id, "video_grid_thw")):
        patches = [] if inputs.get(name) is None else inputs[name].tolist()
        shapes[token] = [(frames, height // merge, width // merge) for frames, height, width in patches]
    lengths = {token: [prod(shape) for shape in shapes[token]] for token in shapes}
    image_shapes = [shapes[token][index] for token, index in reading_order(inputs, lengths)]
    boxes = whole_image_boxes(sizes, len(image_shapes))
    return [
        Grid(image, rows, columns, boxes[image], frame)
        for image, (frames, rows, columns) in enumerate(image_shapes)
        for frame in range(frames)
    ]
