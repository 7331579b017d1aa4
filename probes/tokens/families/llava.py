"""LLaVA-1.5: an image is one grid of patches, center-cropped or padded to a square by the image processor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from probes.tokens.families.pixtral import pixtral_grids
from probes.tokens.grid import Grid
from probes.tokens.image_transform import processed_image
from probes.tokens.layout_registry import register_layout
from probes.tokens.model_inputs import ImageSizes, require_pixels, size_of_image


@register_layout("llava")
def llava_layout(config: PretrainedConfig, inputs: Mapping[str, Any], sizes: ImageSizes, processor: Any) -> list[Grid]:
    """Return one grid per image.

    With `vision_feature_select_strategy="full"`, the CLS token of the vision tower, if it has one, comes first. It
    covers no part of the image.
    """
    if config.vision_config.model_type == "pixtral":
        return pixtral_grids(inputs, sizes, config.vision_config.patch_size, processor)
    pixels, patch = require_pixels(inputs), config.vision_config.patch_size
    image_processor = getattr(processor, "image_processor", None)
    grids = []
    for index in range(len(pixels)):
        size = size_of_image(sizes, index, len(pixels))
        image = processed_image(size, image_processor, *pixels.shape[-2:])
        grids.append(image.patch_grid(index, patch))
    return add_class_tokens(config, inputs, grids)


def add_class_tokens(config: PretrainedConfig, inputs: Mapping[str, Any], grids: list[Grid]) -> list[Grid]:
    """Return the grids, each preceded by the CLS token of the vision tower if the model keeps it.

    The model keeps CLS if its config selects all features and the text has one more visual token per grid.
    """
    vision_count = int((inputs["input_ids"] == config.image_token_id).sum())
    if config.vision_feature_select_strategy == "full" and vision_count == sum(len(grid) + 1 for grid in grids):
        return [part for grid in grids for part in (Grid(grid.image, 1, 0, frame=grid.frame, newline=True), grid)]
    return grids
