"""Requests of lmms-eval as samples: a prompt, its images and videos, and the answer to score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from experiments.data.samples import IMAGE_PLACEHOLDER, PLACEHOLDER, VIDEO_PLACEHOLDER, Sample
from llava_mini.images import to_rgb
from llava_mini.video import Video

_IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}


@dataclass(frozen=True)
class VideoSampling:
    """Which frames of a video a model gets.

    Args:
        frames: Number of evenly spaced frames. None takes one a second of a file, as the paper does, and all of a folder.
        max_frames: Largest number of frames; the released scripts have 1,000 on MVBench and MLVU.
        as_images: Whether each frame is an image of its own, for models that accept no videos.
    """

    frames: int | None = None
    max_frames: int | None = None
    as_images: bool = False


def request_sample(
    name: str,
    prompt: str,
    visuals: Sequence[Any],
    sampling: VideoSampling = VideoSampling(),
    answer: str | None = None,
) -> Sample:
    """Build the sample of one request.

    Images and videos go before the prompt, unless the prompt has a placeholder for each of them.

    Args:
        name: The request's name, for errors.
        prompt: The text of the request.
        visuals: PIL images, paths of image or video files, and paths of folders of frames.
        sampling: Which frames of a video the model gets.
        answer: The answer to score; None to generate one.

    Returns:
        A sample with one question, and with the answer if there is one.

    Raises:
        ValueError: If a visual input is of another type, or the prompt's placeholders do not fit the visual inputs.

    Example:
        >>> request_sample("pope 7", "Is there a dog?", [image], answer=" yes").conversations[0]["value"]
        '<image>\\nIs there a dog?'
    """
    inputs = [_open(name, visual, sampling) for visual in visuals]
    if sampling.as_images:
        inputs = [image for visual in inputs for image in (visual if isinstance(visual, Video) else [visual])]
    placeholders = [VIDEO_PLACEHOLDER if isinstance(visual, Video) else IMAGE_PLACEHOLDER for visual in inputs]
    written = PLACEHOLDER.findall(prompt)
    if not written:
        prompt = "".join(f"{placeholder}\n" for placeholder in placeholders) + prompt
    elif written != placeholders:
        raise ValueError(f"{name}: the prompt has the placeholders {written}, and its visual inputs are {placeholders}")
    turns = [{"from": "human", "value": prompt}]
    if answer is not None:
        # A continuation starts with a space, for plain text. Here the chat template separates it from the prompt.
        turns.append({"from": "gpt", "value": answer.strip()})
    return Sample(name, tuple(partial(_same, visual) for visual in inputs), turns, [])


def _same(visual: Any) -> Any:
    return visual


def _open(name: str, visual: Any, sampling: VideoSampling) -> Any:
    if isinstance(visual, Image.Image):
        return to_rgb(visual)
    if isinstance(visual, (str, Path)):
        if Path(visual).suffix.lower() in _IMAGE_SUFFIXES:
            return to_rgb(visual)
        return Video(visual, frames=sampling.frames, max_frames=sampling.max_frames)
    raise ValueError(
        f"{name}: its visual input is a {type(visual).__name__}; it must be an image, or the path of an image, a video "
        "or a folder of frames"
    )
