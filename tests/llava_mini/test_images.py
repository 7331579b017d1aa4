"""Image preparation: RGB conversion of every mode and file type, and padding."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llava_mini.images import pad_to_square, to_rgb
from tests.llava_mini.coordinate_image import coordinates

MEAN = (122, 116, 104)
MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "I", "F", "I;16", "I;16B"]
sizes = st.tuples(st.integers(1, 60), st.integers(1, 60)) | st.sampled_from([(4000, 20), (20, 4000), (1, 4000)])


def one_pixel(mode: str, colour) -> Image.Image:
    return Image.new(mode, (1, 1), colour)


def save_and_open(image: Image.Image, file_format: str = "PNG", **options) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return Image.open(buffer)


@given(size=st.tuples(st.integers(1, 40), st.integers(1, 40)) | st.sampled_from([(600, 2), (2, 600)]))
@settings(max_examples=30)
def test_pad_to_square_centres_the_image_on_its_longer_side(size):
    image = coordinates(*size)
    padded = np.asarray(pad_to_square(image, MEAN))
    width, height = size
    side = max(size)
    expected = np.full((side, side, 3), MEAN, dtype=np.uint8)
    left, top = (side - width) // 2, (side - height) // 2
    expected[top : top + height, left : left + width] = np.asarray(image)
    np.testing.assert_array_equal(padded, expected)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (one_pixel("1", 1), (255, 255, 255)),
        (one_pixel("L", 100), (100, 100, 100)),
        (one_pixel("LA", (100, 255)), (100, 100, 100)),
        (one_pixel("LA", (100, 0)), (255, 255, 255)),
        (one_pixel("RGBA", (10, 20, 30, 0)), (255, 255, 255)),
        (one_pixel("RGBA", (10, 20, 30, 51)), (206, 208, 210)),  # a fifth of the colour, four fifths of white
        (one_pixel("RGBa", (0, 0, 0, 0)), (255, 255, 255)),
        (one_pixel("CMYK", (0, 255, 255, 0)), (255, 0, 0)),
        (one_pixel("CMYK", (0, 0, 0, 255)), (0, 0, 0)),
        (one_pixel("HSV", (0, 0, 77)), (77, 77, 77)),
        (save_and_open(one_pixel("RGB", (1, 2, 3)), transparency=(1, 2, 3)), (255, 255, 255)),
        (save_and_open(one_pixel("RGB", (1, 2, 3)), transparency=(3, 2, 1)), (1, 2, 3)),
        (save_and_open(one_pixel("L", 9), transparency=9), (255, 255, 255)),
        (save_and_open(one_pixel("RGB", (9, 9, 9)).convert("P"), transparency=b"\0" * 256), (255, 255, 255)),
        (save_and_open(one_pixel("L", 0), "GIF", transparency=0), (255, 255, 255)),
        (one_pixel("I;16", 257 * 40), (40, 40, 40)),
        (one_pixel("I;16", 40), (0, 0, 0)),
        (one_pixel("I;16B", 257 * 40), (40, 40, 40)),
        (save_and_open(one_pixel("I;16", 65535)), (255, 255, 255)),
        (one_pixel("I", 257 * 40), (40, 40, 40)),
        (one_pixel("I", 40), (40, 40, 40)),
        (one_pixel("F", 0.2), (51, 51, 51)),
        (one_pixel("F", 50.6), (51, 51, 51)),
        (one_pixel("F", 257 * 51), (51, 51, 51)),
    ],
)
def test_to_rgb_of_every_mode_gives_the_expected_colour(image, expected):
    converted = to_rgb(image)
    assert converted.mode == "RGB"
    assert converted.getpixel((0, 0)) == expected


@given(
    size=sizes,
    mode=st.sampled_from(MODES),
)
@settings(max_examples=40)
def test_to_rgb_of_every_mode_keeps_the_size(size, mode):
    converted = to_rgb(Image.new(mode, size))
    assert (converted.mode, converted.size) == ("RGB", size)


def test_to_rgb_of_16_bit_grey_is_monotonic():
    values = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    grey = np.asarray(to_rgb(Image.fromarray(values)))[..., 0].ravel()
    assert (grey[0], grey[-1]) == (0, 255)
    assert set(np.diff(grey.astype(int))) == {0, 1}


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_to_rgb_of_an_animation_gives_the_current_frame(file_format, tmp_path):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    first, *others = [Image.new("RGB", (8, 8), colour) for colour in colours]
    path = tmp_path / f"animation.{file_format.lower()}"
    first.save(
        path, file_format, save_all=True, append_images=others, **({"lossless": True} if file_format == "WEBP" else {})
    )
    assert to_rgb(path).getpixel((4, 4)) == colours[0]
    assert to_rgb(str(path)).getpixel((4, 4)) == colours[0]
    with Image.open(path) as animation:
        animation.seek(2)
        assert to_rgb(animation).getpixel((4, 4)) == colours[2]
        assert animation.tell() == 2


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_to_rgb_of_a_truncated_file_names_it(file_format, share, tmp_path):
    path = tmp_path / "short"
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, file_format)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(ValueError, match=r"/short( \(mode \w+\))? cannot be") as caught:
        to_rgb(path)
    assert "\n" not in str(caught.value)


def test_to_rgb_of_an_opened_truncated_image_raises():
    buffer = io.BytesIO()
    coordinates(32, 32).save(buffer, "BMP")
    with pytest.raises(ValueError, match=r"^image \(mode RGB\).*truncated"):
        to_rgb(Image.open(io.BytesIO(buffer.getvalue()[:1000])))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (None, TypeError, "got NoneType"),
        (np.zeros((4, 4, 3), np.uint8), TypeError, "got ndarray"),
        ("missing.png", FileNotFoundError, r"no image file at missing\.png"),
        (".", FileNotFoundError, r"no image file at \."),
        (Image.new("RGB", (0, 5)), ValueError, "image has no pixels.*0 x 5"),
        (one_pixel("F", float("nan")), ValueError, r"0\.\.65535.*nan"),
        (one_pixel("F", -0.5), ValueError, r"span -0\.5\.\.-0\.5"),
        (one_pixel("I", 65536), ValueError, r"span 65536\.\.65536"),
        (one_pixel("La", (0, 0)), ValueError, r"image \(mode La\)"),
    ],
)
def test_to_rgb_of_an_invalid_input_raises(wrong, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        to_rgb(wrong)


def test_to_rgb_of_a_file_that_is_not_an_image_names_it(tmp_path):
    path = tmp_path / "notes.png"
    path.write_text("not an image")
    with pytest.raises(ValueError, match=r"notes\.png.*image"):
        to_rgb(path)
