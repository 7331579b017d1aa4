"""Gemma 4: images keep their aspect ratio up to whole pooled patches; videos are sequences of such frames.

Source: transformers' `gemma4`. Its processors add the column and row of every patch to the inputs, -1 for filler.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from probes.tokens.families.image_boxes import whole_image_boxes
from probes.tokens.grid import Grid
from probes.tokens.layout_registry import register_layout
from probes.tokens.model_inputs import ImageSizes, reading_order, require_pixels


@register_layout("gemma4")
def gemma4_layout(config: PretrainedConfig, inputs: Mapping[str, Any], sizes: ImageSizes, processor: Any) -> list[Grid]:
    """Return one grid per image, and one per frame of a video.

    The processor resizes an image to whole pooled patches without keeping its exact aspect ratio, so the tokens cover
    the whole image. `sizes` count images and videos together, in reading order.
    """
    pool = config.vision_config.pooling_kernel_size
    shapes: dict[int, list[list[tuple[int, int]]]] = {}  # by visual token id: rows and columns of each frame
    if (inputs["input_ids"] == config.image_token_id).any():
        images = require_pixels(inputs, "image_position_ids")
        shapes[config.image_token_id] = [[_pooled_shape(patches, pool)] for patches in images]
    if (inputs["input_ids"] == config.video_token_id).any():
        frame_counts = torch.as_tensor(require_pixels(inputs, "num_frames_per_video")).tolist()
        videos = require_pixels(inputs, "video_position_ids").split(frame_counts)
        shapes[config.video_token_id] = [[_pooled_shape(patches, pool) for patches in video] for video in videos]
    lengths = {token: [sum(rows * columns for rows, columns in frames) for frames in shapes[token]] for token in shapes}
    order = reading_order(inputs, lengths)
    boxes = whole_image_boxes(sizes, len(order))
    return [
        Grid(image, rows, columns, boxes[image], frame)
        for image, (token, index) in enumerate(order)
        for frame, (rows, columns) in enumerate(shapes[token][index])
    ]


def _pooled_shape(patches: Tensor, pool: int) -> tuple[int, int]:
    """Return the token rows and columns of an image, given the column and row of its patches `[patches, 2]`."""
    columns, rows = (patches.amax(0) + 1).tolist()
    return rows // pool, columns // pool
