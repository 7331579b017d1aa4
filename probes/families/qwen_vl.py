"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: pictures of any size, patches merged two by two, videos two frames a time.

Source: transformers' `qwen2_vl`, `qwen2_5_vl` and `qwen3_vl`, whose processors leave `image_grid_thw` and
`video_grid_thw` (patches over time, height and width) in the inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from transformers import PretrainedConfig

from probes.families.pictures import visual_positions, whole_boxes
from probes.places import Grid, family


@family("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
def qwen_vl(
    config: PretrainedConfig, inputs: Mapping[str, Any], sizes: Sequence[tuple[int, int]] | None, processor: Any
) -> list[Grid]:
    """One grid a picture, and of a video one for each of its temporal patches, which `frame` counts.

    A temporal patch covers `vision_config.temporal_patch_size` of the frames that were sampled. Qwen3-VL writes the
    time before each of them: these are text. A picture is resized to whole patches, sides apart, so its tokens cover
    all of it. `sizes` count images and videos alike, in reading order.
    """
    merge = config.vision_config.spatial_merge_size
    vision = visual_positions(inputs, config.image_token_id, config.video_token_id)
    is_video = inputs["input_ids"][vision] == config.video_token_id
    shapes = {}  # of the images and of the videos: patches over time, height and width
    for video, name in ((False, "image_grid_thw"), (True, "video_grid_thw")):
        shapes[video] = [] if inputs.get(name) is None else inputs[name].tolist()
        tokens = sum(map(prod, shapes[video])) // merge**2
        count = int((is_video == video).sum())
        if tokens != count:
            raise ValueError(f"{name} make {tokens} visual tokens, input_ids hold {count}: are they of one call?")

    pictures, position = [], 0
    while position < len(is_video):
        time, height, width = shapes[bool(is_video[position])].pop(0)
        pictures.append((time, height // merge, width // merge))
        position += time * height * width // merge**2
    return [
        Grid(picture, rows, columns, box, frame)
        for picture, (box, (frames, rows, columns)) in enumerate(
            zip(whole_boxes(sizes, len(pictures)), pictures, strict=True)
        )
        for frame in range(frames)
    ]
