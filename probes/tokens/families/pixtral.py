"""Mistral 3 and Pixtral: images keep their aspect ratio, up to whole merged patches; a break token ends each row.

Source: transformers' `mistral3` and `pixtral`. The break and end tokens are text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from probes.tokens.grid import Grid
from probes.tokens.image_transform import ProcessedImage
from probes.tokens.layout_registry import register_layout
from probes.tokens.model_inputs import ImageSizes, require_pixels, size_of_image


@register_layout("mistral3")
def mistral3_layout(
    config: PretrainedConfig, inputs: Mapping[str, Any], sizes: ImageSizes, processor: Any
) -> list[Grid]:
    """Return one grid per image, of patches merged `config.spatial_merge_size` x `config.spatial_merge_size`."""
    return pixtral_grids(inputs, sizes, config.vision_config.patch_size * config.spatial_merge_size, processor)


def pixtral_grids(inputs: Mapping[str, Any], sizes: ImageSizes, side: int, processor: Any) -> list[Grid]:
    """Return one grid per image.

    Args:
        inputs: Inputs of the model call, with the sizes of the processed images as `image_sizes`.
        sizes: (height, width) of the original images, or None.
        side: Pixels that a token covers across and down.
        processor: Processor of the model, or None. Without one, images are assumed to be resized and not cropped.
    """
    processed_sizes = [(int(height), int(width)) for height, width in require_pixels(inputs, "image_sizes")]
    crops = getattr(getattr(processor, "image_processor", None), "do_center_crop", None)
    grids = []
    for index, (height, width) in enumerate(processed_sizes):
        size = size_of_image(sizes, index, len(processed_sizes))
        image = ProcessedImage(height, width)
        if size is not None and not crops:
            image = ProcessedImage.original(*size).resize(height, width)
        grids.append(image.patch_grid(index, side))
    return grids
