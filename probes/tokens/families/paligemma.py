"""PaliGemma: every image is resized to one square.

Source: transformers' `paligemma`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from probes.tokens.families.image_boxes import whole_image_boxes
from probes.tokens.families.image_runs import find_image_runs
from probes.tokens.grid import Grid
from probes.tokens.layout_registry import register_layout
from probes.tokens.model_inputs import ImageSizes


@register_layout("paligemma")
def paligemma_layout(
    config: PretrainedConfig, inputs: Mapping[str, Any], sizes: ImageSizes, processor: Any
) -> list[Grid]:
    """Return one grid per image, which covers the whole image."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    vision_count = sum(run.stop - run.start for run in find_image_runs(inputs, config.image_token_index))
    boxes = whole_image_boxes(sizes, vision_count // side**2)
    return [Grid(image, side, side, box) for image, box in enumerate(boxes)]
