"""Videos. The tests write frames whose grey level encodes their index, so that they can identify sampled frames."""

from __future__ import annotations

import logging
import wave
import weakref
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from llava_mini.video import Video, segment_midpoints

STEP = 5  # grey levels between frames; the error of lossy codecs is well below half of it


def make_frame(index: int) -> np.ndarray:
    return np.full((32, 32, 3), index * STEP, dtype=np.uint8)


def read_index(image: Image.Image) -> int:
    """Return the index that the grey level of a frame encodes."""
    assert (image.mode, image.size) == ("RGB", (32, 32))
    return round(np.asarray(image).mean() / STEP)


def read_indices(video: Video) -> list[int]:
    return [read_index(image) for image in video]


CODECS = {  # suffix: codec, pixel format, options
    "mkv": ("ffv1", "bgr0", {}),
    "avi": ("mjpeg", "yuvj420p", {}),
    "mp4": ("mpeg4", "yuv420p", {"qmin": "1", "qmax": "1"}),
    "gif": ("gif", "gray", {}),
    "mov": ("libx264", "yuv420p", {}),  # has frames that depend on later ones
    "webm": ("libvpx-vp9", "yuv420p", {}),
}


@pytest.fixture
def make_video(tmp_path):
    """Return a factory of video files with 32 x 32 frames."""

    def write(frames: int = 48, rate: Fraction | int = 24, name: str = "film.mkv", title: str = "", **muxer) -> Path:
        path = tmp_path / name
        codec, pixels, options = CODECS[path.suffix[1:]]
        if codec not in av.codecs_available:
            pytest.skip(f"this PyAV has no {codec}")
        with av.open(str(path), "w", options=muxer) as container:
            container.metadata["title"] = title
            stream = container.add_stream(codec, rate=rate, options=options)
            stream.width, stream.height, stream.pix_fmt = 32, 32, pixels
            for index in range(frames):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(make_frame(index), format="rgb24")))
            container.mux(stream.encode(None))
        return path

    return write


@given(total=st.integers(2, 3000), data=st.data())
def test_segment_midpoints_are_distinct_and_near_the_centres(total, data):
    count = data.draw(st.integers(1, total - 1))
    indices = segment_midpoints(total, count)
    centres = (np.arange(count) + 0.5) * (total - 1) / count
    assert len(indices) == len(set(indices)) == count
    assert indices == sorted(indices)
    assert np.abs(np.array(indices) - centres).max() <= 1


@pytest.mark.parametrize(
    ("total", "count", "indices"),
    [
        (48, 2, [12, 35]),  # segments are 23.5 long and end at 24 (23.5 rounds to even) and 47
        (10, 3, [1, 4, 7]),
        (300, 8, [18, 56, 93, 131, 168, 205, 243, 280]),
        (9, 1, [4]),
        (5, 5, [0, 1, 2, 3, 4]),
        (3, 8, [0, 1, 2]),
        (1, 8, [0]),
    ],
)
def test_segment_midpoints_equal_precomputed_indices(total, count, indices):
    assert segment_midpoints(total, count) == indices


@pytest.mark.parametrize("suffix", CODECS)
def test_video_of_every_format_gives_the_sampled_frames(make_video, suffix):
    path = make_video(name=f"film.{suffix}")
    assert read_indices(Video(path, frames=48)) == list(range(48))
    video = Video(path, frames=7)
    assert read_indices(video) == video.indices == segment_midpoints(48, 7)


@pytest.mark.parametrize(
    ("frames", "rate", "fps", "expected"),
    [
        (48, 24, None, 2),
        (47, 24, None, 1),
        (48, 24, 1.5, 3),
        (50, 10, 0.3, 1),
        (50, 15, 0.3, 1),
        (40, 4, 0.3, 3),  # exactly 3, although the nearest double to 0.3 is smaller
        (48, Fraction(24000, 1001), None, 2),
        (24, Fraction(24000, 1001), None, 1),
        (23, Fraction(24000, 1001), None, 1),  # less than a second; the official code samples none
        (50, 1000, None, 1),
        (50, 1000, 100, 5),
        (6, Fraction(1, 2), None, 6),  # twelve seconds, but only six frames
        (1, 24, None, 1),
        (10, 5, 60, 10),
    ],
)
def test_video_with_fps_samples_by_the_frame_rate(make_video, frames, rate, fps, expected):
    video = Video(make_video(frames, rate, "film.avi"), fps=fps)
    assert len(video) == expected
    assert read_indices(video) == segment_midpoints(frames, expected)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [({"max_frames": 1}, 1), ({"max_frames": 5}, 2), ({"frames": 9, "max_frames": 4}, 4), ({"frames": 100}, 48)],
)
def test_video_with_max_frames_samples_no_more(make_video, arguments, expected):
    assert read_indices(Video(make_video(), **arguments)) == segment_midpoints(48, expected)


def test_video_iterated_twice_decodes_each_time(make_video):
    video = Video(make_video(), frames=5)
    first = iter(video)
    assert read_index(next(first)) == video.indices[0]
    assert read_indices(video) == read_indices(video) == video.indices
    assert read_index(next(first)) == video.indices[1]


def test_video_iteration_holds_one_frame_at_a_time(make_video):
    video, images = Video(make_video(), frames=20), []
    for image in video:
        images.append(weakref.ref(image))
        del image
        assert not any(reference() for reference in images)
    assert len(images) == 20


class RecordingSequence(Sequence):
    """Ten images, made on access; `requested` records the indices."""

    def __init__(self):
        self.requested: list[int] = []

    def __len__(self):
        return 10

    def __getitem__(self, index):
        self.requested.append(index)
        return Image.fromarray(make_frame(index)).convert("RGBA")


def test_video_of_a_sequence_reads_one_frame_at_a_time():
    frames = RecordingSequence()
    video = Video(frames, frames=3)
    assert (len(video), frames.requested) == (3, [])
    for count, image in enumerate(video, start=1):
        assert read_index(image) == video.indices[count - 1]
        assert frames.requested == video.indices[:count]


def test_video_of_frames_samples_arrays_images_and_paths(tmp_path):
    array = np.stack([make_frame(index) for index in range(12)])
    images = [Image.fromarray(frame) for frame in array]
    paths = [tmp_path / f"{index}.png" for index in range(12)]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    for source in (array, images, paths):
        assert read_indices(Video(source)) == list(range(12))
        assert read_indices(Video(source, frames=3)) == segment_midpoints(12, 3)
        assert read_indices(Video(source, max_frames=4)) == segment_midpoints(12, 4)


def test_video_of_a_truncated_file_gives_the_remaining_frames(make_video):
    path = make_video()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    video = Video(path, frames=48)
    assert 10 < len(video) < 38
    assert read_indices(video) == list(range(len(video)))


def test_video_of_a_truncated_file_ignores_the_count_in_the_header(make_video):
    path = make_video(name="film.mp4", movflags="faststart")  # the header, with 48 frames, comes first
    path.write_bytes(path.read_bytes()[: -path.stat().st_size // 10])
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 48
    video = Video(path, frames=48)
    assert 20 < len(video) < 48
    assert read_indices(video)[:-1] == list(range(len(video) - 1))  # the last frame may be incomplete


@pytest.fixture
def damage_frames():
    """Return a function that overwrites a video's frames from `start` on."""

    def overwrite(path: Path, start: int) -> Path:
        content = path.read_bytes()
        with av.open(str(path)) as container:
            for packet in [packet for packet in container.demux(video=0) if packet.size][start:]:
                content = content.replace(bytes(packet), bytes(packet.size))
        path.write_bytes(content)
        return path

    return overwrite


def test_video_with_damaged_frames_repeats_the_last_one(make_video, damage_frames, caplog):
    path = damage_frames(make_video(name="film.avi"), 40)
    video = Video(path, frames=48)
    with caplog.at_level(logging.WARNING):
        assert read_indices(video) == list(range(40)) + [39] * 8
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith(f"{path}: only 40 frames could be decoded")
    assert read_indices(Video(path, frames=6)) == [4, 12, 20, 27, 35, 39]  # the last should be 43


def test_video_without_a_decodable_frame_raises(make_video, damage_frames):
    video = Video(damage_frames(make_video(name="film.avi"), 0))
    with pytest.raises(ValueError, match=r"film\.avi: no frame could be decoded"):
        next(iter(video))


def test_video_with_metadata_that_is_not_utf8_opens(make_video):
    path = make_video(title="QQQQ")
    path.write_bytes(path.read_bytes().replace(b"QQQQ", b"\xe9\xe8\xe9\xe8"))
    assert len(Video(path)) == 2


def test_video_with_a_colon_in_its_name_opens_as_a_file(make_video, monkeypatch, tmp_path):
    make_video(name="concat:film.mkv")
    monkeypatch.chdir(tmp_path)
    assert len(Video("concat:film.mkv")) == 2


@pytest.fixture
def invalid_files(tmp_path, monkeypatch):
    """Write files that are not videos to the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("folder.mp4").mkdir()
    Path("empty.mp4").touch()
    Path("text.mp4").write_text("no film\n" * 100)
    Path("text.txt").write_text("no film\n" * 100)
    with wave.open("sound.wav", "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(8000))
    with av.open("cover.m4a", "w", format="mp4") as container:
        song, cover = container.add_stream("aac", rate=8000), container.add_stream("png", rate=1)
        cover.width, cover.height, cover.pix_fmt, cover.disposition = 32, 32, "rgb24", Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame.from_ndarray(make_frame(1), format="rgb24")))
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 8000
        container.mux(song.encode(silence))
        container.mux(song.encode(None))


@pytest.mark.usefixtures("invalid_files")
@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("missing.mp4", FileNotFoundError, r"no video file at missing\.mp4"),
        ("folder.mp4", ValueError, "folder.mp4 is a folder without image files"),
        ("empty.mp4", ValueError, "empty.mp4 cannot be read as a video"),
        ("text.mp4", ValueError, "text.mp4 cannot be read as a video"),
        ("text.txt", ValueError, "text.txt has no video stream"),
        ("sound.wav", ValueError, "sound.wav has no video stream"),
        ("cover.m4a", ValueError, "cover.m4a has no video stream"),
    ],
)
def test_video_of_an_invalid_file_names_it(name, error, message):
    for source in (name, Path(name)):
        with pytest.raises(error, match=message) as caught:
            Video(source)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "arguments", "error", "message"),
    [
        ([], {}, ValueError, "has no frames"),
        (np.zeros((0, 4, 4, 3), np.uint8), {}, ValueError, "has no frames"),
        (np.zeros((4, 4, 3), np.uint8), {}, ValueError, r"shape \(frames, height, width, 3\); got uint8 \(4, 4, 3\)"),
        (np.zeros((2, 3, 4, 4), np.uint8), {}, ValueError, r"got uint8 \(2, 3, 4, 4\)"),
        (np.zeros((2, 4, 4, 3)), {}, ValueError, "got float64"),
        (None, {}, TypeError, "got NoneType"),
        (Image.new("RGB", (4, 4)), {}, TypeError, "got Image"),
        ("x.mp4", {"fps": 1, "frames": 8}, ValueError, "fps=1 and frames=8"),
        ("x.mp4", {"fps": 0}, ValueError, "fps must be a positive number; got 0"),
        ("x.mp4", {"fps": float("nan")}, ValueError, "got nan"),
        ("x.mp4", {"fps": "2"}, ValueError, "got '2'"),
        ("x.mp4", {"frames": 0}, ValueError, "frames must be an integer of at least 1; got 0"),
        ("x.mp4", {"frames": 2.5}, ValueError, r"got 2\.5"),
        ("x.mp4", {"max_frames": -1}, ValueError, "max_frames must be an integer of at least 1; got -1"),
        ([Image.new("RGB", (4, 4))], {"fps": 1}, ValueError, "frame rate of the video"),
    ],
)
def test_video_with_wrong_arguments_raises(source, arguments, error, message):
    with pytest.raises(error, match=message):
        Video(source, **arguments)


def test_video_without_pyav_reads_frames_but_no_files(make_video, monkeypatch):
    path = make_video()
    monkeypatch.setattr("llava_mini.video.is_av_available", lambda: False)
    with pytest.raises(ImportError, match=r"film\.mkv needs PyAV"):
        Video(path)
    assert read_indices(Video([Image.fromarray(make_frame(3))])) == [3]
