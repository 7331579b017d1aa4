"""Images and videos of a batch, and the stream of their pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from .video import Video


class CropsProcessor(Protocol):
    """Declare what [`FrameStream`] needs of a processor."""

    ignore_orientation: bool

    def crops(self, picture: Any, squash: bool) -> Float[Tensor, "crops channels height width"]:
        """Prepare the pixels of an image's or a frame's crops."""


@dataclass(frozen=True)
class VisualInput:
    """Describe one image or video of a batch.

    Args:
        row: The row that it belongs to.
        source: An image, the path of one, or a [`Video`].
    """

    row: int
    source: Any

    @property
    def num_frames(self) -> int:
        """Return the number of frames, 1 for an image."""
        return len(self.source) if isinstance(self.source, Video) else 1


class FrameStream:
    """Iterate over the crops of one frame at a time, through all images and videos of a batch.

    Every iteration reads the files again.
    """

    def __init__(self, processor: CropsProcessor, visual_inputs: list[VisualInput]) -> None:
        self.processor, self.visual_inputs = processor, visual_inputs

    def __iter__(self) -> Iterator[Float[Tensor, "crops channels height width"]]:
        for visual in self.visual_inputs:
            if isinstance(visual.source, Video):
                for frame in visual.source.images(self.processor.ignore_orientation):
                    yield self.processor.crops(frame, squash=True)
            else:
                yield self.processor.crops(visual.source, squash=False)


def is_image(given: Any) -> bool:
    """Return whether this is one image or its path, not a list of them."""
    return not isinstance(given, (list, tuple))


def is_video(given: Any) -> bool:
    """Return whether this is one video: a path, a [`Video`], an array, or a list of PIL images."""
    return not isinstance(given, (list, tuple)) or any(isinstance(frame, Image.Image) for frame in given)


def flatten(given: Any, is_one: Callable[[Any], bool]) -> list[Any]:
    """Flatten one image or video, a list of them, or a list for each row.

    Args:
        given: Images or videos, as the processor gets them.
        is_one: [`is_image`] or [`is_video`].
    """
    if given is None:
        return []
    if is_one(given):
        return [given]
    return [x for item in given for x in ([item] if is_one(item) else item)]


def check_rows(name: str, given: Any, is_one: Callable[[Any], bool], counts: list[int]) -> None:
    """Check that lists for each row hold as many images or videos as the text of the row has placeholders.

    Args:
        name: "images" or "videos", for the message.
        given: Images or videos, as the processor gets them.
        is_one: [`is_image`] or [`is_video`].
        counts: Placeholders of each row; empty without text, where every image and video is a row.

    Raises:
        ValueError: If they differ. In the order of the text, an image would go to another row.
    """
    if not counts or given is None or is_one(given) or not len(given) or any(is_one(item) for item in given):
        return
    if (found := [len(item) for item in given]) != counts:
        raise ValueError(f"{name}: the rows get {found}, but their text has {counts} placeholders")


def as_video(source: Any, fps: float | None, num_frames: int | None) -> Video:
    """Open a video given by path, sampled by `fps` or `num_frames`.

    Raises:
        ValueError: If the video is a [`Video`], which is already sampled, and one of the two is given.
    """
    if not isinstance(source, Video):
        return Video(source, fps=fps, frames=num_frames)
    if fps is not None or num_frames is not None:
        raise ValueError(
            f"fps={fps!r} and num_frames={num_frames!r} do not apply to a Video, which is already sampled; "
            "give fps or frames to Video itself"
        )
    return source


__all__ = ["FrameStream", "VisualInput", "as_video", "flatten"]
