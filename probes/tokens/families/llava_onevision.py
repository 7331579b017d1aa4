"""LLaVA-OneVision: one image a row as in LLaVA-NeXT, several padded to squares, videos pooled to half the grid."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig

from probes.tokens.families.llava_next import any_res, keeps_tiles
from probes.tokens.grid import Grid, family, pixels_of, reading_order, size_of
from probes.tokens.image_transform import View, resample, seen


@family("llava_onevision")
def llava_onevision(
    config: PretrainedConfig,
    inputs: Mapping[str, Any],
    sizes: Sequence[tuple[int, int]] | None,
    processor: Any,
) -> list[Grid]:
    """One newline token ends a video, and an image that is not the only one of its row. Videos have boxes where there
    is a processor and `images` give the size of every picture, since the inputs do not hold theirs."""
    pictures = {
        config.image_token_id: _images(config, inputs, processor),
        config.video_token_id: _videos(config, inputs),
    }
    order = reading_order(inputs, {kind: [sum(map(len, grids)) for grids in each] for kind, each in pictures.items()})
    if sizes is not None and len(sizes) == len(pictures[config.image_token_id]) != len(order):
        sizes = None  # those of the images alone, which have their boxes already
    grids, side = [], config.vision_config.image_size
    for picture, (kind, number) in enumerate(order):
        parts = pictures[kind][number]
        if kind == config.video_token_id:
            view = seen(size_of(sizes, picture, len(order)), getattr(processor, "video_processor", None), side, side)
            across, down = view.patches(picture, config.vision_config.patch_size).spans()
            half = resample(across, parts[0].columns), resample(down, parts[0].rows)
            parts = [replace(grid, edges=half) if grid.columns else grid for grid in parts]
        grids += [replace(grid, picture=picture) for grid in parts]
    return grids


def _images(config: PretrainedConfig, inputs: Mapping[str, Any], processor: Any) -> list[list[Grid]]:
    if not (inputs["input_ids"] == config.image_token_id).any():
        return []
    pixels_of(inputs)
    sizes = inputs["image_sizes"].tolist()
    of_row = inputs.get("batch_num_images")
    alone = [True] * len(sizes) if of_row is None else [n == 1 for n in map(int, of_row) for _ in range(n)]
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
    pictures = []
    for size, single in zip(sizes, alone, strict=True):
        if single:
            pictures.append(any_res(config, 0, size, processor, most))
        else:
            view = View.whole(*size).pad_to_square() if keeps_tiles(processor, side) else View(*size)
            pictures.append([view.resize(side, side).patches(0, patch), Grid(0, 1, 0, newline=True)])
    return pictures


def _videos(config: PretrainedConfig, inputs: Mapping[str, Any]) -> list[list[Grid]]:
    """Without boxes."""
    if not (inputs["input_ids"] == config.video_token_id).any():
        return []
    frames = pixels_of(inputs, "pixel_values_videos").shape[1]
    half = math.ceil(config.vision_config.image_size // config.vision_config.patch_size / 2)
    video = [Grid(0, half, half, frame=frame) for frame in range(frames)]
    return [[*video, Grid(0, 1, 0, frame=frames - 1, newline=True)] for _ in inputs["pixel_values_videos"]]
