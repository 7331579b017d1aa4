"""LLaVA-OneVision: a single image per row as in LLaVA-NeXT, several images padded to squares, videos pooled by two."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig

from probes.tokens.families.llava_next import anyres_grids, keeps_tile_size
from probes.tokens.grid import Grid
from probes.tokens.image_transform import ProcessedImage, processed_image, resample_edges
from probes.tokens.layout_registry import register_layout
from probes.tokens.model_inputs import ImageSizes, reading_order, require_pixels, size_of_image


@register_layout("llava_onevision")
def llava_onevision_layout(
    config: PretrainedConfig, inputs: Mapping[str, Any], sizes: ImageSizes, processor: Any
) -> list[Grid]:
    """Return the grids of all images and videos in reading order.

    One newline token ends a video, and an image in a row of several images. The inputs do not hold the sizes of videos.
    Videos therefore have boxes only with a processor and with `images` that include every video.
    """
    grids_by_token = {
        config.image_token_id: _image_grids(config, inputs, processor),
        config.video_token_id: _video_grids(config, inputs),
    }
    lengths = {token: [sum(map(len, parts)) for parts in images] for token, images in grids_by_token.items()}
    order = reading_order(inputs, lengths)
    if sizes is not None and len(sizes) == len(grids_by_token[config.image_token_id]) != len(order):
        sizes = None  # these are the sizes of the images alone, which already have boxes
    grids, side = [], config.vision_config.image_size
    for image, (token, index) in enumerate(order):
        parts = grids_by_token[token][index]
        if token == config.video_token_id:
            size = size_of_image(sizes, image, len(order))
            frame = processed_image(size, getattr(processor, "video_processor", None), side, side)
            across, down = frame.patch_grid(image, config.vision_config.patch_size).spans()
            pooled = resample_edges(across, parts[0].columns), resample_edges(down, parts[0].rows)
            parts = [replace(grid, edges=pooled) if grid.columns else grid for grid in parts]
        grids += [replace(grid, image=image) for grid in parts]
    return grids


def _image_grids(config: PretrainedConfig, inputs: Mapping[str, Any], processor: Any) -> list[list[Grid]]:
    """Return the grids of each image, all numbered as image 0."""
    if not (inputs["input_ids"] == config.image_token_id).any():
        return []
    require_pixels(inputs)
    sizes = inputs["image_sizes"].tolist()
    images_per_row = inputs.get("batch_num_images")
    if images_per_row is None:
        alone_in_row = [True] * len(sizes)
    else:
        alone_in_row = [count == 1 for count in map(int, images_per_row) for _ in range(count)]
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    max_tiles = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
    grids = []
    for size, alone in zip(sizes, alone_in_row, strict=True):
        if alone:
            grids.append(anyres_grids(config, 0, size, processor, max_tiles))
        else:
            keeps_size = keeps_tile_size(processor, side)
            image = ProcessedImage.original(*size).pad_to_square() if keeps_size else ProcessedImage(*size)
            grids.append([image.resize(side, side).patch_grid(0, patch), Grid(0, 1, 0, newline=True)])
    return grids


def _video_grids(config: PretrainedConfig, inputs: Mapping[str, Any]) -> list[list[Grid]]:
    """Return the grids of each video without boxes, all numbered as image 0."""
    if not (inputs["input_ids"] == config.video_token_id).any():
        return []
    frames = require_pixels(inputs, "pixel_values_videos").shape[1]
    half = math.ceil(config.vision_config.image_size // config.vision_config.patch_size / 2)
    video = [Grid(0, half, half, frame=frame) for frame in range(frames)]
    return [[*video, Grid(0, 1, 0, frame=frames - 1, newline=True)] for _ in inputs["pixel_values_videos"]]
