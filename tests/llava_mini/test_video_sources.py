"""Videos that are turned by a display matrix, animated images, and folders of frames."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageOps

from llava_mini.images import to_rgb
from llava_mini.video import Video, to_upright_image

UPRIGHT = np.random.default_rng(0).integers(0, 256, (24, 48, 3), dtype=np.uint8)


SMOOTH = np.zeros((24, 48, 3), np.uint8)  # four colours, which JPEG keeps
SMOOTH[:12, :24], SMOOTH[:12, 24:], SMOOTH[12:, :24] = (200, 40, 40), (40, 200, 40), (40, 40, 200)


def write_turned(path: Path, matrix=None, frames: int = 2, **rotation) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png" if path.suffix == ".mov" else "ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 24, "rgb24" if path.suffix == ".mov" else "bgr0"
        if matrix is not None:
            stream.set_display_matrix(matrix)
        elif rotation:
            stream.set_display_rotation(**rotation)
        for _ in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(UPRIGHT, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def matrix_of(a, b, c, d) -> list[int]:
    one = 2**16
    return [int(a * one), int(b * one), 0, int(c * one), int(d * one), 0, 0, 0, 2**30]


@pytest.mark.parametrize("suffix", ["mov", "mkv"])
@pytest.mark.parametrize(
    ("rotation", "expected"),
    [
        ({}, UPRIGHT),
        ({"degrees": 0}, UPRIGHT),
        ({"degrees": 90}, np.rot90(UPRIGHT)),
        ({"degrees": 180}, np.rot90(UPRIGHT, 2)),
        ({"degrees": -90}, np.rot90(UPRIGHT, -1)),
        ({"degrees": 270}, np.rot90(UPRIGHT, 3)),
        ({"degrees": 0, "hflip": True}, UPRIGHT[:, ::-1]),
        ({"degrees": 0, "vflip": True}, UPRIGHT[::-1]),
        ({"degrees": 90, "hflip": True}, np.rot90(UPRIGHT)[:, ::-1]),
        ({"degrees": 90, "vflip": True}, np.rot90(UPRIGHT)[::-1]),
        ({"degrees": 89.5}, np.rot90(UPRIGHT)),
    ],
)
def test_video_with_a_display_matrix_is_turned_upright(tmp_path, suffix, rotation, expected):
    video = Video(write_turned(tmp_path / f"film.{suffix}", **rotation), frames=2)
    for image in video:
        assert np.array_equal(np.asarray(image), expected)


@pytest.mark.parametrize(
    "matrix", [(1, 0, 0, 1), (-1, 0, 0, -1), (0, 1, -1, 0), (0, -1, 1, 0), (0, 1, 1, 0), (2, 0, 0, -2), (0, -1, -1, 0)]
)
def test_video_with_a_display_matrix_maps_pixels_by_its_definition(tmp_path, matrix):
    """FFmpeg defines the matrix: column x and row y are shown at (a x + c y, b x + d y), up to a shift and a scale."""
    a, b, c, d = np.sign(matrix)
    row, column = np.indices(UPRIGHT.shape[:2])
    shown_column, shown_row = a * column + c * row, b * column + d * row
    shown_column, shown_row = shown_column - shown_column.min(), shown_row - shown_row.min()
    expected = np.zeros((shown_row.max() + 1, shown_column.max() + 1, 3), np.uint8)
    expected[shown_row, shown_column] = UPRIGHT
    image = next(iter(Video(write_turned(tmp_path / "film.mov", matrix_of(*matrix)), frames=1)))
    assert np.array_equal(np.asarray(image), expected)


@pytest.mark.parametrize("degrees", [45, 30, 88])
def test_video_turned_by_another_angle_raises(tmp_path, degrees):
    video = Video(write_turned(tmp_path / "film.mov", degrees=degrees))
    with pytest.raises(ValueError, match=r"film\.mov is turned by \d\d degrees.*multiples of 90"):
        next(iter(video))


STEP = 5  # grey levels between frames


def grey_frame(index: int) -> Image.Image:
    return Image.new("RGB", (16, 16), (index * STEP,) * 3)


def read_indices(video: Video) -> list[int]:
    return [round(np.asarray(image).mean() / STEP) for image in video]


ANIMATIONS = {
    "gif": {"disposal": 1},
    "webp": {"lossless": True},
    "png": {},
    "apng": {"format": "PNG"},
    "avif": {"quality": 100},
}


def write_animation(path: Path, durations: list[int], **options) -> Path:
    first, *others = [grey_frame(index) for index in range(len(durations))]
    first.save(path, save_all=True, append_images=others, duration=durations, **ANIMATIONS[path.suffix[1:]], **options)
    return path


@pytest.fixture(params=ANIMATIONS)
def suffix(request):
    return request.param


def write_constant_rate(path: Path, durations: list[int], step: int) -> Path:
    """Write a video that shows each frame for as long as the animation does, at one frame each `step` milliseconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=1000 // step)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "bgr0"
        for index, duration in enumerate(durations):
            for _ in range(duration // step):
                container.mux(stream.encode(av.VideoFrame.from_image(grey_frame(index))))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("fps", [None, 0.5, 1.5])
@pytest.mark.parametrize(
    "durations", [[100] * 5 + [1000] * 5, [2000] + [200] * 20, [100] * 19 + [3000], [500, 100, 400] * 6]
)
def test_video_of_an_animation_samples_as_a_video_of_constant_rate(tmp_path, suffix, durations, fps):
    video = Video(write_animation(tmp_path / f"a.{suffix}", durations), fps=fps)
    assert len(video) == int(sum(durations) / 1000 * (fps or 1))
    expected = Video(write_constant_rate(tmp_path / "film.mkv", durations, math.gcd(*durations)), fps=fps)
    assert read_indices(video) == read_indices(expected) == video.indices


def test_video_of_an_animation_with_equal_durations_samples_by_index(tmp_path, suffix):
    path = write_animation(tmp_path / f"a.{suffix}", [40] * 50)
    assert Video(path).indices == Video(list(range(50)), frames=2).indices
    assert read_indices(Video(path, fps=4)) == Video(list(range(50)), frames=8).indices


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"frames": 4}, [0, 1, 2, 3]),
        ({"frames": 9}, [0, 1, 2, 3]),
        ({"frames": 1}, [1]),
        ({"fps": 100}, [0, 1, 2, 3]),
        ({"fps": 1, "max_frames": 1}, [2]),
    ],
)
def test_video_of_an_animation_with_few_frames_gives_each_once(tmp_path, suffix, arguments, expected):
    path = write_animation(tmp_path / f"a.{suffix}", [1000, 500, 2000, 500])
    assert read_indices(Video(path, **arguments)) == expected


def test_video_of_an_animation_without_durations_shows_each_for_a_tenth_of_a_second(tmp_path):
    for name in ("a.gif", "a.png"):
        assert len(Video(write_animation(tmp_path / name, [0] * 40))) == 4


def test_video_of_an_animation_is_found_by_its_content(tmp_path):
    path = write_animation(tmp_path / "a.gif", [500] * 4)
    shutil.copy(path, tmp_path / "clip.mp4")
    assert read_indices(Video(tmp_path / "clip.mp4", frames=4)) == [0, 1, 2, 3]


def test_video_of_an_apng_with_a_separate_still_leaves_it_out(tmp_path):
    path = tmp_path / "a.png"
    frames = [grey_frame(index) for index in (9, 0, 1, 2)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=[500] * 3, default_image=True)
    assert read_indices(Video(path, frames=3)) == [0, 1, 2]


def test_video_of_an_animation_with_transparency_is_composited_on_white(tmp_path):
    frames = [Image.new("RGBA", (16, 16), (10 * i, 0, 0, 0 if i == 1 else 255)) for i in range(3)]
    frames[0].save(
        tmp_path / "a.webp", save_all=True, append_images=frames[1:], duration=500, lossless=True, exact=True
    )
    colours = [image.getpixel((8, 8)) for image in Video(tmp_path / "a.webp", frames=3)]
    assert colours == [(0, 0, 0), (255, 255, 255), (20, 0, 0)]


def test_video_of_an_animation_needs_no_pyav(tmp_path, suffix, monkeypatch):
    path = write_animation(tmp_path / f"a.{suffix}", [500] * 4)
    monkeypatch.setattr("llava_mini.video.is_av_available", lambda: False)
    assert read_indices(Video(path)) == [1, 2]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_video_of_a_photo_turns_it_upright(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(SMOOTH).save(tmp_path / "a.jpg", exif=exif, quality=95)
    (image,) = Video(tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened)).astype(int)
    assert np.abs(np.asarray(image) - expected).mean() < 10  # without a turn, FFmpeg decodes it


def test_video_of_jpeg_frames_with_exif_is_turned(tmp_path):
    """FFmpeg hands the EXIF data of each frame on, which PyAV cannot name."""
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(SMOOTH).save(buffer, "JPEG", exif=exif, quality=95)
    (tmp_path / "film").write_bytes(buffer.getvalue() * 3)
    with av.open(str(tmp_path / "film"), format="mjpeg") as container:
        frames = list(container.decode(video=0))
    assert len(frames) > 1
    image = to_upright_image(frames[0], tmp_path / "film")
    assert np.abs(np.asarray(image).astype(int) - np.rot90(SMOOTH, -1)).mean() < 10
    assert image.size == (24, 48)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "avif"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.8, 0.9, 0.97])
def test_video_of_a_truncated_animation_of_any_length_gives_frames_or_names_it(tmp_path, suffix, share):
    path = tmp_path / f"a.{suffix}"
    noise = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)) for i in range(9)]
    noise[0].save(path, save_all=True, append_images=noise[1:], duration=500)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with contextlib.suppress(ValueError) if suffix != "gif" or share < 0.1 else contextlib.nullcontext():
        assert 0 < len(list(Video(path, frames=9))) < 10
        return
    with pytest.raises(ValueError, match=rf"/a\.{suffix}(:| cannot| has no)") as caught:
        list(Video(path, frames=9))
    assert "\n" not in str(caught.value)


def test_video_of_a_truncated_animation_gives_the_remaining_frames(tmp_path, caplog):
    path = tmp_path / "a.gif"
    noise = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 16), np.uint8)) for i in range(20)]
    noise[0].save(path, save_all=True, append_images=noise[1:], duration=500)
    whole = [np.asarray(image) for image in Video(path, frames=20)]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with caplog.at_level(logging.WARNING):
        part = [np.asarray(image) for image in Video(path, frames=20)]
    assert 5 < len(part) < 15
    assert all(np.array_equal(*pair) for pair in zip(part[:-1], whole, strict=False))


NATURAL = ["frame2.png", "frame10.png", "frame1.png", "frame003.png"]


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (NATURAL, ["frame1.png", "frame2.png", "frame003.png", "frame10.png"]),
        (["10.png", "9.png", "100.png"], ["9.png", "10.png", "100.png"]),
        (["b1.png", "a2.png", "A10.png"], ["a2.png", "A10.png", "b1.png"]),
        (["s1_f10.png", "s1_f9.png", "s0_f11.png"], ["s0_f11.png", "s1_f9.png", "s1_f10.png"]),
        (["1.png", "01.png", "x.png"], ["01.png", "1.png", "x.png"]),
        (["f1.PNG", "f2.bmp", "f3.tif"], ["f1.PNG", "f2.bmp", "f3.tif"]),
        (["00012345678901234567890.png", "2.png"], ["2.png", "00012345678901234567890.png"]),
    ],
)
def test_video_of_a_folder_takes_the_frames_in_natural_order(tmp_path, names, order):
    folder = tmp_path / "frames"
    folder.mkdir()
    for name in names:
        grey_frame(order.index(name)).save(folder / name)
    (folder / ".DS_Store").write_bytes(b"\0")
    (folder / "Thumbs.db").write_bytes(b"\0")
    for source in (folder, str(folder)):
        assert read_indices(Video(source)) == list(range(len(names)))
    assert read_indices(Video(folder, frames=1)) == [(len(names) - 1) // 2]
    assert len(Video(folder, max_frames=2)) == 2


def test_video_of_a_folder_turns_frames_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (16, 8)).save(tmp_path / "frame1.jpg", exif=exif)
    (image,) = Video(tmp_path)
    assert image.size == to_rgb(tmp_path / "frame1.jpg").size == (8, 16)
    (stored,) = Video(tmp_path).images(ignore_orientation=True)
    assert stored.size == (16, 8)


@pytest.mark.parametrize(
    ("files", "arguments", "message"),
    [
        ([], {}, "frames is a folder without image files"),
        (["a.png", "notes.txt"], {}, r"frames is a folder with 1 entries.*notes\.txt"),
        (["a.mp4", "b.mp4"], {}, r"frames is a folder with 2 entries.*a\.mp4"),
        (["a.png", "more/"], {}, r"the first more;"),
        (["a.png"], {"fps": 1}, "frame rate of .*frames is unknown"),
    ],
)
def test_video_of_a_wrong_folder_names_it(tmp_path, files, arguments, message):
    folder = tmp_path / "frames"
    folder.mkdir()
    for name in files:
        if name.endswith("/"):
            (folder / name).mkdir()
        else:
            grey_frame(0).save(folder / name, format="PNG")
    with pytest.raises(ValueError, match=message) as caught:
        Video(folder, **arguments)
    assert "\n" not in str(caught.value)
