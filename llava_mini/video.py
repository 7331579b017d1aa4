"""Videos as streams of sampled frames. Their indices are known at once; pixels are decoded one frame at a time."""

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
    """Sample the frames of a video: `len(video)` counts them, and `iter(video)` yields each as a PIL image in RGB.

    A file is read once to count its frames, without decoding them. Each iteration decodes it again, from its start to
    the last sampled frame, and holds only the current frame. Frames are sampled at the midpoints of equal segments; see
    [`segment_midpoints`]. Rotation noted in the file is ignored.

    If frames are damaged, later ones move up. The last decoded frame then replaces those that are missing at the end,
    and a warning is logged.

    Args:
        source (path, sequence of images or paths, or `np.ndarray`):
            A file that PyAV can read. Or the frames themselves: a sequence of PIL images or of their paths, or a uint8
            array of shape (frames, height, width, 3).
        fps (`float`, *optional*):
            Samples a second, for files; 1 by default, as in the official inference. This gives floor(frames / frame
            rate * fps) samples, but at least one. Frames that are given themselves are all sampled.
        frames (`int`, *optional*):
            Number of samples, instead of `fps`; 8 in the official training. A video of fewer frames gives each once.
        max_frames (`int`, *optional*):
            Largest number of samples, spread over the whole video.

    Attributes:
        indices (`list[int]`): Indices of the sampled frames, counted from 0 and ascending.

    Raises:
        ImportError: If `source` is a file and PyAV is not installed.
        FileNotFoundError: If no file exists at the path.
        ValueError: If the file is not a video, there are no frames, or an argument is out of range.
        TypeError: If `source` has another type.

    Example:
        >>> from llava_mini.video import Video
        >>> video = Video([image] * 10, frames=3)
        >>> video.indices
        [1, 4, 7]
        >>> [frame.size for frame in video]
        [(48, 48), (48, 48), (48, 48)]
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
            raise TypeError(f"a video must be a path, a sequence of images or an array; got {type(source).__name__}")
        if total == 0:
            raise ValueError(f"{name} has no frames")

        if frames is None and (fps is not None or isinstance(source, Path)):
            if not rate:
                raise ValueError(f"the frame rate of {name} is unknown: give frames instead of fps")
            frames = max(int(total * Fraction(str(fps or 1)) / rate), 1)
        counts = [count for count in (frames, max_frames) if count is not None]
        self._source = source
        self.indices = segment_midpoints(total, min(counts, default=total))

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
        frame, num_decoded, num_yielded = None, 0, 0
        for num_decoded, frame in enumerate(decode_frames(path), start=1):
            if num_decoded - 1 == self.indices[num_yielded]:
                yield frame.to_image()
                num_yielded += 1
                if num_yielded == len(self):
                    return
        if frame is None:
            raise ValueError(f"{path}: no frame could be decoded")
        logger.warning("%s: only %d frames could be decoded; the last one replaces the rest", path, num_decoded)
        for _ in range(num_yielded, len(self)):
            yield frame.to_image()


def segment_midpoints(total: int, count: int) -> list[int]:
    """Return the indices of frames to sample: the midpoints of equal segments.

    Segments end at round(i * (total - 1) / count), as in the official `get_seq_frames`. For `count` = `total` that
    function samples some frames twice and leaves out others; this one returns all frames.

    Args:
        total: Number of frames of the video.
        count: Number of frames to sample. If it is at least `total`, all frames are sampled.

    Example:
        >>> from llava_mini.video import segment_midpoints
        >>> segment_midpoints(48, 2)
        [12, 35]
    """
    if count >= total:
        return list(range(total))
    bounds = np.rint(np.arange(count + 1) * ((total - 1) / count)).astype(int)
    return ((bounds[:-1] + bounds[1:]) // 2).tolist()


def count_frames(path: Path) -> tuple[int, Fraction | None]:
    """Return the number of frames in a file, and the frames a second (None if unknown).

    The packets are counted, because the header of a truncated file gives a wrong number.
    """
    with open_video_stream(path) as (container, stream):
        total = sum(not packet.is_discard for packet in demux_packets(container, stream))
        return total, stream.average_rate or stream.guessed_rate


def decode_frames(path: Path) -> Iterator[av.VideoFrame]:
    """Decode the frames of a file in order of presentation. Damaged frames are left out."""
    with open_video_stream(path) as (container, stream):
        stream.thread_type = "AUTO"
        for packet in chain(demux_packets(container, stream), [None]):  # None flushes the decoder
            try:
                frames = stream.decode(packet)
            except av.FFmpegError:
                continue
            yield from frames


def demux_packets(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.Packet]:
    """Iterate over the stream's packets up to the end of the file, or up to the first damaged one."""
    try:
        yield from (packet for packet in container.demux(stream) if packet.size)
    except av.FFmpegError as error:
        logger.warning("%s: reading ended early: %s", container.name, error.strerror)


@contextmanager
def open_video_stream(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Open a file and yield it with its first video stream that is not a cover image.

    Raises:
        ImportError: If PyAV is not installed.
        FileNotFoundError: If no file exists at the path.
        ValueError: If the path is a folder, or the file cannot be read or has no video stream.
    """
    if not is_av_available():
        raise ImportError(f"reading {path} needs PyAV: pip install av")
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a video file; for a folder of frames give their sorted paths")
    if not path.is_file():
        raise FileNotFoundError(f"there is no video file at {path}")
    try:
        # Use the absolute path, because FFmpeg would read a colon in a relative one as a protocol. Metadata may be
        # invalid UTF-8.
        container = av.open(str(path.absolute()), metadata_errors="replace")
    except av.FFmpegError as error:
        raise ValueError(f"{path} cannot be read as a video: {error.strerror}") from error
    with container:
        streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
        if not streams or container.format.name == "tty":  # FFmpeg decodes any text file as a terminal recording
            raise ValueError(f"{path} has no video stream")
        yield container, streams[0]


__all__ = ["Video", "segment_midpoints"]
