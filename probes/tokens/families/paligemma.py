"""PaliGemma: every picture squashed to one square.

Source: transformers' `paligemma`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PretrainedConfig

from probes.tokens.families.image_runs import image_runs, whole_boxes
from probes.tokens.grid import Grid, family


@family("paligemma")
def paligemma(
    config: PretrainedConfig, inputs: Mapping[str, Any], sizes: Sequence[tuple[int, int]] | None, processor: Any
) -> list[Grid]:
    """One grid a picture, which it covers whole."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    tokens = sum(run.stop - run.start for run in image_runs(inputs, config.image_token_index))
    boxes = whole_boxes(sizes, tokens // side**2)
    return [Grid(picture, side, side, box) for picture, box in enumerate(boxes)]
