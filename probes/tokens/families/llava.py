"""LLaVA-1.5: an image is one grid of patches, cropped at the centre or padded to a square by the image processor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PretrainedConfig

from probes.tokens.grid import Grid, family, pixels_of, size_of
from probes.tokens.image_transform import seen


@family("llava")
def llava(
    config: PretrainedConfig,
    inputs: Mapping[str, Any],
    sizes: Sequence[tuple[int, int]] | None,
    processor: Any,
) -> list[Grid] | None:
    """With `vision_feature_select_strategy="full"` the tower's CLS token, if it has one, comes first, without a place.

    None for a Pixtral tower, whose grid is another for every image.
    """
    if config.vision_config.model_type == "pixtral":
        return None
    pixels, patch = pixels_of(inputs), config.vision_config.patch_size
    grids = []
    for picture in range(len(pixels)):
        size = size_of(sizes, picture, len(pixels))
        view = seen(size, getattr(processor, "image_processor", None), *pixels.shape[-2:])
        grids.append(view.patches(picture, patch))
    return with_class_tokens(config, inputs, grids)


def with_class_tokens(config: PretrainedConfig, inputs: Mapping[str, Any], grids: list[Grid]) -> list[Grid]:
    """With the tower's CLS token ahead of every grid, where the model keeps it and the text has room for it."""
    tokens = int((inputs["input_ids"] == config.image_token_id).sum())
    if config.vision_feature_select_strategy == "full" and tokens == sum(len(grid) + 1 for grid in grids):
        return [part for grid in grids for part in (Grid(grid.picture, 1, 0, frame=grid.frame, newline=True), grid)]
    return grids
