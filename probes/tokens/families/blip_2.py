"""BLIP-2: a Q-Former turns an image, resized to a square, into a fixed number of query tokens.

Source: transformers' `blip_2`. Every query token attends to the whole image, so none has a smaller place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from probes.tokens.grid import Grid
from probes.tokens.image_transform import processed_image
from probes.tokens.layout_registry import register_layout
from probes.tokens.model_inputs import ImageSizes, require_pixels, size_of_image


@register_layout("blip-2")
def blip_2_layout(config: PretrainedConfig, inputs: Mapping[str, Any], sizes: ImageSizes, processor: Any) -> list[Grid]:
    """Return one grid per image: a single row whose columns count the query tokens, which share the image's box."""
    pixels, image_processor = require_pixels(inputs), getattr(processor, "image_processor", None)
    grids = []
    for index in range(len(pixels)):
        size = size_of_image(sizes, index, len(pixels))
        box = processed_image(size, image_processor, *pixels.shape[-2:]).box
        grids.append(Grid(index, 1, config.num_query_tokens, box, shared=True))
    return grids
