"""Videos as streams of sampled frames. Their indices are known at once; pixels are decoded one frame at a time."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from transformers.utils import is_av_available

from .animations import Animation, read_animation
from .images import to_rgb

if TYPE_CHECKING:
    import av

# Signs of a display matrix's entries (a, b, c, d), and the turn they stand for. A pixel in column x and row y is shown in
# column a x + c y and row b x + d y.
TURNS = {
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}

logger = logging.getLogger(__name__)


class Video:
    """Sample the frames of a video: `len(video)` counts them, and `iter(video)` yields each as a PIL image in RGB.

    A file is read once to count its frames, without decoding them. Each iteration decodes it again, from its start to
    the last sampled frame, and holds only the current frame. Frames are sampled at the midpoints of equal segments; see
    [`segment_midpoints`]. Frames are turned and mirrored as the file's display matrix states.

    A GIF, animated WebP, animated PNG or animated AVIF is read with Pillow and needs no PyAV. Its frames have durations
    of their own. `fps` then samples by time, so a frame that is shown for long may be sampled repeatedly. Frames of at
    most 10 ms count as 100 ms, as browsers show them.

    If frames are damaged, later ones move up. The last decoded frame then replaces those that are missing at the end,
    and a warning is logged.

    Args:
        source (path, sequence of images or paths, or `np.ndarray`):
            A file that PyAV or, for animations, Pillow can read. Or a folder of image files, in natural order:
            frame2.png precedes frame10.png. Or the frames themselves: a sequence of PIL images or of their paths, or a
            uint8 array of shape (frames, height, width, 3).
        fps (`float`, *optional*):
            Samples a second, for files; 1 by default, as in the official inference. This gives floor(frames / frame
            rate * fps) samples, but at least one. Frames of a folder or given themselves have no frame rate; all are
            sampled.
        frames (`int`, *optional*):
            Number of samples, instead of `fps`; 8 in the official training. A video of fewer frames gives each once.
        max_frames (`int`, *optional*):
            Largest number of samples, spread over the whole video.

    Attributes:
        indices (`list[int]`): Indices of the sampled frames, counted from 0 and ascending.

    Raises:
        ImportError: If `source` is a file and PyAV is not installed.
        FileNotFoundError: If no file exists at the path.
        ValueError: If the file is not a video, the folder has other files than images, there are no frames, or an
            argument is out of range.
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
        animation: Animation | None = None
        samples_by_time = frames is None
        name = "the video"
        if isinstance(source, (str, os.PathLike)):
            source = Path(source)
            name = str(source)
            if source.is_dir():
                source = list_frame_files(source)
                total = len(source)
            elif source.is_file() and (animation := read_animation(source)):
                total, rate = (
                    len(animation.durations),
                    Fraction(len(animation.durations) * 10**6, sum(animation.durations)),
                )
            else:
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
                raise ValueError(f"the frame rate of {name} is unknown: give the number of frames instead of fps")
            frames = max(int(total * Fraction(str(fps or 1)) / rate), 1)
        count = min([count for count in (frames, max_frames) if count is not None], default=total)
        self._source: Any = animation or source
        if animation and samples_by_time and count < total:
            self.indices = animation.frames_at(segment_midpoints(animation.clock, count))
        else:
            self.indices = segment_midpoints(total, count)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Image.Image]:
        return self.images()

    def images(self, ignore_orientation: bool = False) -> Iterator[Image.Image]:
        """Decode the sampled frames in RGB, one at a time.

        Args:
            ignore_orientation: Whether frames that are image files or PIL images keep the pixels as stored; see
                [`llava_mini.images.to_rgb`]. Frames of a video file are turned upright in any case.
        """
        if isinstance(self._source, Animation):
            yield from self._sample(self._source.path, self._source.frames(ignore_orientation))
        elif isinstance(self._source, Path):
            yield from self._sample(self._source, decode_frames(self._source))
        else:
            for index in self.indices:
                frame = self._source[index]
                yield to_rgb(Image.fromarray(frame) if isinstance(frame, np.ndarray) else frame, ignore_orientation)

    def _sample(self, path: Path, frames: Iterable[av.VideoFrame | Image.Image]) -> Iterator[Image.Image]:
        frame, num_decoded, num_yielded = None, 0, 0
        for num_decoded, frame in enumerate(frames, start=1):
            while num_decoded - 1 == self.indices[num_yielded]:
                yield frame if isinstance(frame, Image.Image) else to_upright_image(frame, path)
                num_yielded += 1
                if num_yielded == len(self):
                    return
        if frame is None:
            raise ValueError(f"{path}: no frame could be decoded")
        logger.warning("%s: only %d frames could be decoded; the last one replaces the rest", path, num_decoded)
        for _ in range(num_yielded, len(self)):
            yield frame if isinstance(frame, Image.Image) else to_upright_image(frame, path)


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


def list_frame_files(folder: Path) -> list[Path]:
    """List the image files of a folder in natural order: frame2.png precedes frame10.png.

    Hidden files and those that Windows creates (Thumbs.db, desktop.ini) are left out.

    Raises:
        ValueError: If the folder has no image file, or other files or folders, which cannot be frames.
    """

    def natural_order(path: Path) -> tuple[list[str | int], str]:
        parts = re.split(r"(\d+)", path.name.casefold())  # numbers have the odd indices
        return [int(part) if i % 2 else part for i, part in enumerate(parts)], path.name

    images = {suffix for suffix, name in Image.registered_extensions().items() if "image/" in Image.MIME.get(name, "")}
    entries = [
        path
        for path in folder.iterdir()
        if not path.name.startswith(".") and path.name not in ("Thumbs.db", "desktop.ini")
    ]
    others = sorted(path.name for path in entries if path.suffix.lower() not in images or not path.is_file())
    if not entries:
        raise ValueError(f"{folder} is a folder without image files; a video is a file or a folder of its frames")
    if others:
        raise ValueError(
            f"{folder} is a folder with {len(others)} entries that are not image files, the first {others[0]}; "
            "a folder of frames must hold the frames alone"
        )
    return sorted(entries, key=natural_order)


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
        from av import FFmpegError

        stream.thread_type = "AUTO"
        for packet in chain(demux_packets(container, stream), [None]):  # None flushes the decoder
            try:
                frames = stream.decode(packet)
            except FFmpegError:
                continue
            yield from frames


def to_upright_image(frame: av.VideoFrame, path: Path) -> Image.Image:
    """Convert a frame to an image in RGB, turned and mirrored as its display matrix states.

    Raises:
        ValueError: If the matrix turns by another angle than a multiple of 90 degrees, with a tolerance of 1 degree.
    """
    image = frame.to_image()
    try:
        side_data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV does not know every type of side data, for example the EXIF data of JPEG frames
        angle = math.radians(frame.rotation)
        matrix = np.array([math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle)])
    else:
        if side_data is None:
            return image
        matrix = np.frombuffer(bytes(side_data), np.int32)[[0, 1, 3, 4]] / 2**16
    is_large = np.abs(matrix) > math.sin(math.radians(1)) * np.abs(matrix).max()
    signs = tuple(np.where(is_large, np.sign(matrix), 0).astype(int).tolist())
    if signs not in TURNS and signs != (1, 0, 0, 1):
        raise ValueError(
            f"{path} is turned by {frame.rotation} degrees, with the display matrix {matrix.tolist()}; "
            "only multiples of 90 degrees are supported"
        )
    return image.transpose(TURNS[signs]) if signs in TURNS else image


def demux_packets(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.Packet]:
    """Iterate over the stream's packets up to the end of the file, or up to the first damaged one."""
    from av import FFmpegError

    try:
        yield from (packet for packet in container.demux(stream) if packet.size)
    except FFmpegError as error:
        logger.warning("%s: reading ended early: %s", container.name, error.strerror)


@contextmanager
def open_video_stream(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Open a file and yield it with its first video stream that is not a cover image.

    Raises:
        ImportError: If PyAV is not installed.
        FileNotFoundError: If no file exists at the path.
        ValueError: If the file cannot be read or has no video stream.
    """
    if not is_av_available():
        raise ImportError(f"reading {path} needs PyAV: pip install av")
    if not path.is_file():
        raise FileNotFoundError(f"there is no video file at {path}")
    import av  # optional, and its many modules serve video files only
    from av.stream import Disposition

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
