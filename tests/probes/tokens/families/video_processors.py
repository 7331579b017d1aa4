"""Stand-in video processors that work without torchvision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin
from transformers.video_utils import VideoMetadata


class QwenFrames:
    """Stand-in for Qwen's video processor: patches of frames from arrays. Video processors need torchvision."""

    model_input_names = ("pixel_values_videos", "video_grid_thw")

    def __init__(self, image_processor: Any) -> None:
        self.image_processor = image_processor
        self.merge_size, self.temporal_patch_size = image_processor.merge_size, image_processor.temporal_patch_size

    def __call__(self, videos: Sequence[np.ndarray], **kwargs: Any) -> BatchFeature:
        patches, grids, patch = [], [], self.image_processor.patch_size
        for video in videos:
            frames = [self.image_processor(Image.fromarray(frame), return_tensors="pt") for frame in video]
            _, high, wide = frames[0]["image_grid_thw"][0].tolist()
            # The image processor repeats an image as equal frames, so the first of them suffices.
            still = [
                frame["pixel_values"].unflatten(1, (3, self.temporal_patch_size, patch, patch)) for frame in frames
            ]
            moving = torch.stack([frame[:, :, 0] for frame in still]).unflatten(0, (-1, self.temporal_patch_size))
            patches.append(moving.permute(0, 2, 3, 1, 4, 5).reshape(len(moving) * high * wide, -1))
            grids.append([len(moving), high, wide])
        data = {"pixel_values_videos": torch.cat(patches), "video_grid_thw": torch.tensor(grids)}
        return BatchFeature(data | {"video_metadata": half_seconds(videos)})


class WholeFrames:
    """Stand-in video processor of families that process each frame of a video as an uncut image."""

    def __init__(self, image_processor: Any, name: str, **kwargs: Any) -> None:
        self.image_processor, self.name, self.kwargs = image_processor, name, kwargs
        self.model_input_names = (name,)

    def __call__(self, videos: Sequence[np.ndarray], **kwargs: Any) -> BatchFeature:
        flat = [
            self.image_processor(Image.fromarray(frame), return_tensors="pt", **self.kwargs)["pixel_values"]
            for video in videos
            for frame in video
        ]
        pixels = torch.stack([frame.flatten(0, -4)[0] for frame in flat]).unflatten(0, (len(videos), -1))
        return BatchFeature({self.name: pixels, "video_metadata": half_seconds(videos)})


def half_seconds(videos: Sequence[np.ndarray]) -> list[VideoMetadata]:
    return [
        VideoMetadata(total_num_frames=len(video), fps=2.0, frames_indices=[*range(len(video))]) for video in videos
    ]


def without_video_processor(processor: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """Return the processor class, changed to accept any video processor, because none works without torchvision."""

    def check_argument(self: ProcessorMixin, name: str, value: Any) -> Any:
        return None if name == "video_processor" else processor.check_argument_for_proper_class(self, name, value)

    return type(processor.__name__, (processor,), {"check_argument_for_proper_class": check_argument})
