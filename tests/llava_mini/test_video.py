"""Videos are written here, of frames whose grey tells their index, so that what was sampled can be read back."""

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

STEP = 5  # grey levels between frames: lossy codecs stay well within half of it


def grey(index: int) -> np.ndarray:
    return np.full((32, 32, 3), index * STEP, dtype=np.uint8)


def index_of(image: Image.Image) -> int:
    assert (image.mode, image.size) == ("RGB", (32, 32))
    return round(np.asarray(image).mean() / STEP)


def sampled(video: Video) -> list[int]:
    return [index_of(image) for image in video]


CODECS = {  # suffix: codec, pixel format, options
    "mkv": ("ffv1", "bgr0", {}),
    "avi": ("mjpeg", "yuvj420p", {}),
    "mp4": ("mpeg4", "yuv420p", {"qmin": "1", "qmax": "1"}),
    "gif": ("gif", "gray", {}),
    "mov": ("libx264", "yuv420p", {}),  # has frames that refer to later ones
    "webm": ("libvpx-vp9", "yuv420p", {}),
}


@pytest.fixture
def film(tmp_path):
    """Factory of video files of 32 x 32 frames."""

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
                container.mux(stream.encode(av.VideoFrame.from_ndarray(grey(index), format="rgb24")))
            container.mux(stream.encode(None))
        return path

    return write


@given(total=st.integers(2, 3000), data=st.data())
def test_midpoints_of_equal_segments(total, data):
    count = data.draw(st.integers(1, total - 1))
    indices = segment_midpoints(total, count)
    centres = (np.arange(count) + 0.5) * (total - 1) / count
    assert len(indices) == len(set(indices)) == count
    assert indices == sorted(indices)
    assert np.abs(np.array(indices) - centres).max() <= 1


@pytest.mark.parametrize(
    ("total", "count", "indices"),
    [
        (48, 2, [12, 35]),  # segments are 23.5 long: 0, 24 (23.5 rounds to even), 47
        (10, 3, [1, 4, 7]),
        (300, 8, [18, 56, 93, 131, 168, 205, 243, 280]),
        (9, 1, [4]),
        (5, 5, [0, 1, 2, 3, 4]),
        (3, 8, [0, 1, 2]),
        (1, 8, [0]),
    ],
)
def test_indices_by_hand(total, count, indices):
    assert segment_midpoints(total, count) == indices


@pytest.mark.parametrize("suffix", CODECS)
def test_files_give_the_frames_sampled(film, suffix):
    path = film(name=f"film.{suffix}")
    assert sampled(Video(path, frames=48)) == list(range(48))
    video = Video(path, frames=7)
    assert sampled(video) == video.indices == segment_midpoints(48, 7)


@pytest.mark.parametrize(
    ("frames", "rate", "fps", "expected"),
    [
        (48, 24, None, 2),
        (47, 24, None, 1),
        (48, 24, 1.5, 3),
        (50, 10, 0.3, 1),
        (50, 15, 0.3, 1),
        (40, 4, 0.3, 3),  # 3 exactly, though the double nearest to 0.3 is a little less
        (48, Fraction(24000, 1001), None, 2),
        (24, Fraction(24000, 1001), None, 1),
        (23, Fraction(24000, 1001), None, 1),  # less than a second: none in the official code
        (50, 1000, None, 1),
        (50, 1000, 100, 5),
        (6, Fraction(1, 2), None, 6),  # twelve seconds, but no more frames than six
        (1, 24, None, 1),
        (10, 5, 60, 10),
    ],
)
def test_samples_a_second(film, frames, rate, fps, expected):
    video = Video(film(frames, rate, "film.avi"), fps=fps)
    assert len(video) == expected
    assert sampled(video) == segment_midpoints(frames, expected)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [({"max_frames": 1}, 1), ({"max_frames": 5}, 2), ({"frames": 9, "max_frames": 4}, 4), ({"frames": 100}, 48)],
)
def test_max_frames_is_a_cap(film, arguments, expected):
    assert sampled(Video(film(), **arguments)) == segment_midpoints(48, expected)


def test_each_iteration_decodes_anew(film):
    video = Video(film(), frames=5)
    first = iter(video)
    assert index_of(next(first)) == video.indices[0]
    assert sampled(video) == sampled(video) == video.indices
    assert index_of(next(first)) == video.indices[1]


def test_frames_do_not_outlive_their_turn(film):
    video, images = Video(film(), frames=20), []
    for image in video:
        images.append(weakref.ref(image))
        del image
        assert not any(reference() for reference in images)
    assert len(images) == 20


class Recorder(Sequence):
    """Ten images, made when asked for; remembers which were."""

    def __init__(self):
        self.asked: list[int] = []

    def __len__(self):
        return 10

    def __getitem__(self, index):
        self.asked.append(index)
        return Image.fromarray(grey(index)).convert("RGBA")


def test_given_frames_are_fetched_one_at_a_time():
    frames = Recorder()
    video = Video(frames, frames=3)
    assert (len(video), frames.asked) == (3, [])
    for done, image in enumerate(video, start=1):
        assert index_of(image) == video.indices[done - 1]
        assert frames.asked == video.indices[:done]


def test_frames_given_themselves(tmp_path):
    array = np.stack([grey(index) for index in range(12)])
    images = [Image.fromarray(frame) for frame in array]
    paths = [tmp_path / f"{index}.png" for index in range(12)]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    for source in (array, images, paths):
        assert sampled(Video(source)) == list(range(12))
        assert sampled(Video(source, frames=3)) == segment_midpoints(12, 3)
        assert sampled(Video(source, max_frames=4)) == segment_midpoints(12, 4)


def test_a_file_cut_short_gives_what_is_there(film):
    path = film()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    video = Video(path, frames=48)
    assert 10 < len(video) < 38
    assert sampled(video) == list(range(len(video)))


def test_a_header_that_promises_too_much_is_not_believed(film):
    path = film(name="film.mp4", movflags="faststart")  # the header, which says 48, comes first
    path.write_bytes(path.read_bytes()[: -path.stat().st_size // 10])
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 48
    video = Video(path, frames=48)
    assert 20 < len(video) < 48
    assert sampled(video)[:-1] == list(range(len(video) - 1))  # the cut may have gone through the last one


@pytest.fixture
def damage():
    """Overwrites a film's frames from `start` on."""

    def overwrite(path: Path, start: int) -> Path:
        content = path.read_bytes()
        with av.open(str(path)) as container:
            for packet in [packet for packet in container.demux(video=0) if packet.size][start:]:
                content = content.replace(bytes(packet), bytes(packet.size))
        path.write_bytes(content)
        return path

    return overwrite


def test_the_last_frame_stands_in_for_damaged_ones(film, damage, caplog):
    path = damage(film(name="film.avi"), 40)
    video = Video(path, frames=48)
    with caplog.at_level(logging.WARNING):
        assert sampled(video) == list(range(40)) + [39] * 8
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: only 40 frames could be decoded; the last one stands in for the rest"
    ]
    assert sampled(Video(path, frames=6)) == [4, 12, 20, 27, 35, 39]  # the last should be 43


def test_no_frame_at_all_is_an_error(film, damage):
    video = Video(damage(film(name="film.avi"), 0))
    with pytest.raises(ValueError, match=r"film\.avi: no frame could be decoded"):
        next(iter(video))


def test_metadata_need_not_be_utf8(film):
    path = film(title="QQQQ")
    path.write_bytes(path.read_bytes().replace(b"QQQQ", b"\xe9\xe8\xe9\xe8"))
    assert len(Video(path)) == 2


def test_a_colon_in_the_name_is_no_protocol(film, monkeypatch, tmp_path):
    film(name="concat:film.mkv")
    monkeypatch.chdir(tmp_path)
    assert len(Video("concat:film.mkv")) == 2


@pytest.fixture
def files(tmp_path, monkeypatch):
    """What is no video, under names in the current folder."""
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
        container.mux(cover.encode(av.VideoFrame.from_ndarray(grey(1), format="rgb24")))
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 8000
        container.mux(song.encode(silence))
        container.mux(song.encode(None))


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("missing.mp4", FileNotFoundError, "there is no video file at missing.mp4"),
        ("folder.mp4", ValueError, "folder.mp4 is a folder"),
        ("empty.mp4", ValueError, "empty.mp4 cannot be read as a video"),
        ("text.mp4", ValueError, "text.mp4 cannot be read as a video"),
        ("text.txt", ValueError, "text.txt has no video stream"),
        ("sound.wav", ValueError, "sound.wav has no video stream"),
        ("cover.m4a", ValueError, "cover.m4a has no video stream"),
    ],
)
def test_what_is_no_video_is_named(name, error, message):
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
        ("x.mp4", {"fps": 1, "frames": 8}, ValueError, "either fps or frames; got fps=1 and frames=8"),
        ("x.mp4", {"fps": 0}, ValueError, "fps must be a positive number; got 0"),
        ("x.mp4", {"fps": float("nan")}, ValueError, "got nan"),
        ("x.mp4", {"fps": "2"}, ValueError, "got '2'"),
        ("x.mp4", {"frames": 0}, ValueError, "frames must be an integer of at least 1; got 0"),
        ("x.mp4", {"frames": 2.5}, ValueError, r"got 2\.5"),
        ("x.mp4", {"max_frames": -1}, ValueError, "max_frames must be an integer of at least 1; got -1"),
        ([Image.new("RGB", (4, 4))], {"fps": 1}, ValueError, "frame rate of the video is not known: give frames"),
    ],
)
def test_errors(source, arguments, error, message):
    with pytest.raises(error, match=message):
        Video(source, **arguments)


def test_without_pyav_files_need_it_and_given_frames_do_not(film, monkeypatch):
    path = film()
    monkeypatch.setattr("llava_mini.video.is_av_available", lambda: False)
    with pytest.raises(ImportError, match=r"film\.mkv needs PyAV: pip install av"):
        Video(path)
    assert sampled(Video([Image.fromarray(grey(3))])) == [3]
