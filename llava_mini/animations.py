"""Animated images (GIF, WebP, APNG, AVIF) as videos: their frames, and how long each is shown."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from .images import IMAGE_READ_ERRORS, to_rgb

FORMATS = ("GIF", "WEBP", "PNG", "AVIF")
PHOTO_FORMATS = ("JPEG", "MPO")
SHORTEST_MS = 10  # browsers and FFmpeg show a frame of at most this duration for DEFAULT_MS
DEFAULT_MS = 100

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Animation:
    """Describe an animated image file.

    Args:
        path: The file.
        durations: How long each frame is shown, in microseconds.
        first: Index of the first frame in Pillow's count: 1 if the file begins with a still for other programs.
    """

    path: Path
    durations: tuple[int, ...]
    first: int

    def frames(self, ignore_orientation: bool = False) -> Iterator[Image.Image]:
        """Decode the frames in RGB, one at a time, up to the first damaged one."""
        with Image.open(self.path) as image:
            for index in range(self.first, self.first + len(self.durations)):
                try:
                    image.seek(index)
                    frame = to_rgb(image, ignore_orientation)
                except IMAGE_READ_ERRORS as error:
                    logger.warning("%s: reading ended early: %s", self.path, error)
                    return
                yield frame

    @property
    def clock(self) -> int:
        """Return how many ticks of the longest common time step the animation takes."""
        return sum(self.durations) // math.gcd(*self.durations)

    def frames_at(self, ticks: Sequence[int]) -> list[int]:
        """Return the index of the frame that is shown at each tick of the clock."""
        ends = list(accumulate(duration // math.gcd(*self.durations) for duration in self.durations))
        return np.searchsorted(ends, ticks, side="right").tolist()


def read_animation(path: Path) -> Animation | None:
    """Read the durations of an animated image file.

    Pillow knows a frame's duration only after decoding it, so the file is decoded once, one frame at a time.

    Returns:
        The animation; None if the file is another format or holds one frame. A photo that its EXIF data turns is an
        animation of one frame, because PyAV does not read this entry reliably.
    """
    try:
        with Image.open(
            path, formats=[name for name in (*FORMATS, *PHOTO_FORMATS) if name in _known_formats()]
        ) as image:
            if image.format in PHOTO_FORMATS:
                is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
                return Animation(path, (1000 * DEFAULT_MS,), 0) if is_turned else None
            if not getattr(image, "is_animated", False):
                return None
            first = int(bool(getattr(image, "default_image", False)))
            durations = []
            for index in range(first, getattr(image, "n_frames", 1)):
                try:
                    image.seek(index)
                    image.load()
                except IMAGE_READ_ERRORS:
                    break
                shown = image.info.get("duration") or 0
                durations.append(round(1000 * (shown if shown > SHORTEST_MS else DEFAULT_MS)))
            return Animation(path, tuple(durations), first) if durations else None
    except IMAGE_READ_ERRORS:
        return None


def _known_formats() -> set[str]:
    Image.init()
    return set(Image.OPEN)


__all__ = ["Animation", "read_animation"]
