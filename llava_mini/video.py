"""Videos as streams of frames: which frames will be seen is known at once, their pixels pass one frame at a time."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image
from transformers.utils import is_av_available

from .images import to_rgb

if is_av_available():
    import av
    from av.stream import Disposition

logger = logging.getLogger(__name__)


class Video:
    """The sampled frames of a video: `len(video)` of them, and `iter(video)` gives each as a PIL image in RGB.

    A file is read once to count its frames, without decoding them, and decoded anew, from its start to the last frame
    sampled, by each iteration. No more than the frame at hand is kept. Frames are sampled at the midpoints of equal
    segments; see [`midpoints`]. Rotation noted in the file is not applied.

    If frames turn out to be damaged, later ones move up, and the last one that could be decoded stands in for those
    that are missing at the end; a warning says so.

    Args:
        source: A file that PyAV can read; or the frames themselves, as a sequence of PIL images (or of their paths), or
            as a uint8 array of shape (frames, height, width, 3).
        fps: Samples a second, 1 by default as in the official inference: floor(frames / frame rate * fps) of them, but
            at least one. Files only: frames that are given themselves are all sampled.
        frames: Samples in all, in place of `fps` (8 in the official training). A video of fewer frames gives each of
            them once.
        max_frames: Samples at most, spread over the whole video.

    Attributes:
        indices: The sampled frames, counted from 0 and ascending.

    Raises:
        ImportError: If a file is to be read and PyAV is not installed.
        FileNotFoundError: If no file is at the path.
        ValueError: If the file is no video, there are no frames, or an argument is out of range.
        TypeError: If the source is of another kind.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Sequence[Image.Image | str | os.PathLike[str]] | np.ndarray,
        fps: float | None = None,
        frames: int | None = None,
        max_frames: int | None = None,
    ):
        if fps is not None and frames is not None:
            raise ValueError(f"give either fps or frames; got fps={fps!r} and frames={frames!r}")
        if fps is not None and not (isinstance(fps, (int, float)) and 0 < fps < math.inf):
            raise ValueError(f"fps must be a positive number; got {fps!r}")
        for argument, value in (("frames", frames), ("max_frames", max_frames)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{argument} must be an integer of at least 1; got {value!r}")

        rate: Fraction | None = None
        name = "the video"
        if isinstance(source, (str, os.PathLike)):
            source = Path(source)
            name = str(source)
            total, rate = count_frames(source)
        elif isinstance(source, np.ndarray):
            if source.dtype != np.uint8 or source.ndim != 4 or source.shape[3] != 3:
                raise ValueError(
                    f"frames must be uint8 of shape (frames, height, width, 3); got {source.dtype} {source.shape}"
                )
            total = len(source)
        elif isinstance(source, Sequence):
            total = len(source)
        else:
            raise TypeError(f"a video is a path, a sequence of images or an array; got {type(source).__name__}")
        if total == 0:
            raise ValueError(f"{name} has no frames")

        if frames is None and (fps is not None or isinstance(source, Path)):
            if not rate:
                raise ValueError(f"the frame rate of {name} is not known: give frames instead of fps")
            frames = max(int(total * Fraction(str(fps or 1)) / rate), 1)
        counts = [count for count in (frames, max_frames) if count is not None]
        self._source = source
        self.indices = midpoints(total, min(counts, default=total))

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Image.Image]:
        if isinstance(self._source, Path):
            yield from self._from_file(self._source)
        else:
            for index in self.indices:
                frame = self._source[index]
                yield to_rgb(Image.fromarray(frame) if isinstance(frame, np.ndarray) else frame)

    def _from_file(self, path: Path) -> Iterator[Image.Image]:
        frame, decoded, done = None, 0, 0
        for decoded, frame in enumerate(decode(path), start=1):
            if decoded - 1 == self.indices[done]:
                yield frame.to_image()
                done += 1
                if done == len(self):
                    return
        if frame is None:
            raise ValueError(f"{path}: no frame could be decoded")
        logger.warning("%s: only %d frames could be decoded; the last one stands in for the rest", path, decoded)
        for _ in range(done, len(self)):
            yield frame.to_image()


def midpoints(total: int, count: int) -> list[int]:
    """Which `count` of `total` frames to sample: the midpoints of equal segments, or all frames if there are no more.

    Segments are bounded by round(i * (total - 1) / count), as in the official `get_seq_frames`, which for
    `count` = `total` samples some frames twice and leaves out others.
    """
    if count >= total:
        return list(range(total))
    bounds = np.rint(np.arange(count + 1) * ((total - 1) / count)).astype(int)
    return ((bounds[:-1] + bounds[1:]) // 2).tolist()


def count_frames(path: Path) -> tuple[int, Fraction | None]:
    """Frames in the file and frames a second. Headers count wrongly where a file was cut short: packets are counted."""
    with open_stream(path) as (container, stream):
        total = sum(not packet.is_discard for packet in packets(container, stream))
        return total, stream.average_rate or stream.guessed_rate


def decode(path: Path) -> Iterator[av.VideoFrame]:
    """The frames of the file in order of presentation; what is damaged is left out."""
    with open_stream(path) as (container, stream):
        stream.thread_type = "AUTO"
        for packet in chain(packets(container, stream), [None]):  # None asks for what the decoder still holds
            try:
                frames = stream.decode(packet)
            except av.FFmpegError:
                continue
            yield from frames


def packets(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.Packet]:
    """The stream's packets up to the end of the file or to where it is damaged."""
    try:
        yield from (packet for packet in container.demux(stream) if packet.size)
    except av.FFmpegError as error:
        logger.warning("%s: reading ended early: %s", container.name, error.strerror)


@contextmanager
def open_stream(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The opened file and its first video stream that is not a cover picture."""
    if not is_av_available():
        raise ImportError(f"reading {path} needs PyAV: pip install av")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; of a folder of frames, give the sorted paths")
    if not path.is_file():
        raise FileNotFoundError(f"there is no video file at {path}")
    try:
        # An absolute path, lest a colon in the name be read as a protocol; metadata is not always valid UTF-8.
        container = av.open(str(path.absolute()), metadata_errors="replace")
    except av.FFmpegError as error:
        raise ValueError(f"{path} cannot be read as a video: {error.strerror}") from error
    with container:
        streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
        if not streams or container.format.name == "tty":  # FFmpeg shows any text as the film of a terminal
            raise ValueError(f"{path} has no video stream")
        yield container, streams[0]


__all__ = ["Video", "midpoints"]
