"""Gemma 3n: every image is resized to one square, of which the vision tower makes a square grid of features.

Source: transformers' `gemma3n`.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any

from transformers import PretrainedConfig

from probes.tokens.families.image_boxes import whole_image_boxes
from probes.tokens.families.image_runs import find_image_runs
from probes.tokens.grid import Grid
from probes.tokens.layout_registry import register_layout
from probes.tokens.model_inputs import ImageSizes


@register_layout("gemma3n")
def gemma3n_layout(
    config: PretrainedConfig, inputs: Mapping[str, Any], sizes: ImageSizes, processor: Any
) -> list[Grid]:
    """Return one grid per image, which covers the whole image."""
    side = isqrt(config.vision_soft_tokens_per_image)
    vision_count = sum(run.stop - run.start for run in find_image_runs(inputs, config.image_token_id))
    boxes = whole_image_boxes(sizes, vision_count // side**2)
    return [Grid(image, side, side, box) for image, box in enumerate(boxes)]
