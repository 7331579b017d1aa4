"""Cutting, padding and stitching against index arithmetic on images whose pixels hold their own coordinates."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llava_mini.images import pad_to_square, to_rgb
from llava_mini.tiles import cut_into_tiles, stitch_tiles

MEAN = (122, 116, 104)
MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "I", "F", "I;16", "I;16B"]
sizes = st.tuples(st.integers(1, 60), st.integers(1, 60)) | st.sampled_from([(4000, 20), (20, 4000), (1, 4000)])


def coordinates(width: int, height: int) -> Image.Image:
    """Pixel (x, y) is (x mod 256, y mod 256, x // 256 + 16 * (y // 256)): no two are the same."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x % 256, y % 256, x // 256 + 16 * (y // 256)], axis=-1).astype(np.uint8))


def one_pixel(mode: str, colour) -> Image.Image:
    return Image.new(mode, (1, 1), colour)


def saved(image: Image.Image, kind: str = "PNG", **options) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return Image.open(buffer)


@given(size=sizes, tiles=st.integers(2, 5))
@settings(max_examples=40)
def test_crops_are_slices_in_row_major_order(size, tiles):
    image = coordinates(*size)
    pixels, (width, height) = np.asarray(image), (max(size[0] // tiles, 1), max(size[1] // tiles, 1))
    *crops, whole = cut_into_tiles(image, tiles)
    assert whole is image
    assert len(crops) == tiles**2
    for index, crop in enumerate(crops):
        row, column = divmod(index, tiles)
        top, left = min(row * height, size[1] - 1), min(column * width, size[0] - 1)
        np.testing.assert_array_equal(np.asarray(crop), pixels[top : top + height, left : left + width])
        assert crop.size == (width, height)


def test_left_over_pixels_are_in_the_whole_image_only():
    crops = cut_into_tiles(coordinates(5, 7), 2)
    assert [crop.size for crop in crops] == [(2, 3)] * 4 + [(5, 7)]
    assert [crop.getpixel((0, 0))[:2] for crop in crops] == [(0, 0), (2, 0), (0, 3), (2, 3), (0, 0)]


def test_a_side_shorter_than_the_tiles_gives_single_pixels():
    *crops, _ = cut_into_tiles(coordinates(2, 9), 3)
    assert [crop.size for crop in crops] == [(1, 3)] * 9
    assert [crop.getpixel((0, 0))[0] for crop in crops[:3]] == [0, 1, 1]


def test_one_tile_is_the_image_once():
    image = coordinates(4, 3)
    (only,) = cut_into_tiles(image, 1)
    assert only is image


@pytest.mark.parametrize("tiles", [0, -1, 2.0, None])
def test_tiles_is_a_positive_integer(tiles):
    with pytest.raises(ValueError, match=f"at least 1; got {tiles}"):
        cut_into_tiles(coordinates(4, 4), tiles)


@given(size=st.tuples(st.integers(1, 40), st.integers(1, 40)) | st.sampled_from([(600, 2), (2, 600)]))
@settings(max_examples=30)
def test_padding_centres_on_the_longer_side(size):
    image = coordinates(*size)
    padded = np.asarray(pad_to_square(image, MEAN))
    width, height = size
    side = max(size)
    expected = np.full((side, side, 3), MEAN, dtype=np.uint8)
    left, top = (side - width) // 2, (side - height) // 2
    expected[top : top + height, left : left + width] = np.asarray(image)
    np.testing.assert_array_equal(padded, expected)


def test_padding_before_cutting_shares_the_border_among_tiles():
    *crops, whole = cut_into_tiles(pad_to_square(coordinates(4, 2), MEAN), 2)
    assert whole.size == (4, 4)
    for crop, (left, row_of_image) in zip(crops, [(0, 1), (2, 1), (0, 0), (2, 0)], strict=True):
        assert crop.size == (2, 2)
        assert crop.getpixel((0, 1 - row_of_image)) == MEAN
        assert crop.getpixel((0, row_of_image))[0] == left


@given(frames=st.integers(1, 3), tiles=st.integers(1, 4), side=st.integers(1, 4), width=st.integers(1, 3))
@settings(max_examples=30)
def test_stitch_puts_every_patch_at_its_place(frames, tiles, side, width):
    total = tiles * side
    features = torch.empty(frames, tiles**2, side**2, width, dtype=torch.long)
    for frame, part, patch, channel in np.ndindex(*features.shape):
        row = part // tiles * side + patch // side
        column = part % tiles * side + patch % side
        features[frame, part, patch, channel] = ((frame * total + row) * total + column) * width + channel
    expected = torch.arange(frames * total**2 * width).reshape(frames, total**2, width)
    assert torch.equal(stitch_tiles(features, tiles), expected)


def test_stitching_undoes_cutting():
    image = coordinates(12, 12)
    crops = np.stack([np.asarray(crop).reshape(16, 3) for crop in cut_into_tiles(image, 3)[:-1]])
    np.testing.assert_array_equal(stitch_tiles(torch.from_numpy(crops)[None], 3)[0].reshape(12, 12, 3), np.asarray(image))


@pytest.mark.parametrize(("parts", "patches"), [(5, 4), (4, 6)])
def test_stitch_names_what_does_not_fit(parts, patches):
    with pytest.raises(ValueError, match=f"got {parts} tiles of {patches} patches"):
        stitch_tiles(torch.zeros(1, parts, patches, 2), 2)


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
        (saved(one_pixel("RGB", (1, 2, 3)), transparency=(1, 2, 3)), (255, 255, 255)),
        (saved(one_pixel("RGB", (1, 2, 3)), transparency=(3, 2, 1)), (1, 2, 3)),
        (saved(one_pixel("L", 9), transparency=9), (255, 255, 255)),
        (saved(one_pixel("RGB", (9, 9, 9)).convert("P"), transparency=b"\0" * 256), (255, 255, 255)),
        (saved(one_pixel("L", 0), "GIF", transparency=0), (255, 255, 255)),
        (one_pixel("I;16", 257 * 40), (40, 40, 40)),
        (one_pixel("I;16", 40), (0, 0, 0)),
        (one_pixel("I;16B", 257 * 40), (40, 40, 40)),
        (saved(one_pixel("I;16", 65535)), (255, 255, 255)),
        (one_pixel("I", 257 * 40), (40, 40, 40)),
        (one_pixel("I", 40), (40, 40, 40)),
        (one_pixel("F", 0.2), (51, 51, 51)),
        (one_pixel("F", 50.6), (51, 51, 51)),
        (one_pixel("F", 257 * 51), (51, 51, 51)),
    ],
)
def test_colours(image, expected):
    converted = to_rgb(image)
    assert converted.mode == "RGB"
    assert converted.getpixel((0, 0)) == expected


@given(
    size=sizes,
    mode=st.sampled_from(MODES),
)
@settings(max_examples=40)
def test_size_is_kept_whatever_the_mode(size, mode):
    converted = to_rgb(Image.new(mode, size))
    assert (converted.mode, converted.size) == ("RGB", size)


def test_16_bits_keep_their_order():
    values = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    grey = np.asarray(to_rgb(Image.fromarray(values)))[..., 0].ravel()
    assert (grey[0], grey[-1]) == (0, 255)
    assert set(np.diff(grey.astype(int))) == {0, 1}


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation(kind, tmp_path):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    first, *others = [Image.new("RGB", (8, 8), colour) for colour in colours]
    path = tmp_path / f"film.{kind.lower()}"
    first.save(path, kind, save_all=True, append_images=others, **({"lossless": True} if kind == "WEBP" else {}))
    assert to_rgb(path).getpixel((4, 4)) == colours[0]
    assert to_rgb(str(path)).getpixel((4, 4)) == colours[0]
    with Image.open(path) as film:
        film.seek(2)
        assert to_rgb(film).getpixel((4, 4)) == colours[2]
        assert film.tell() == 2


def test_orientation_in_exif_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.jpg"
    coordinates(16, 8).save(path, exif=exif)
    assert to_rgb(path).size == (16, 8)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9])
def test_a_file_cut_short_is_named(kind, kept, tmp_path):
    path = tmp_path / "short"
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, kind)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(ValueError, match=r"/short( \(mode \w+\))? cannot be") as caught:
        to_rgb(path)
    assert "\n" not in str(caught.value)


def test_an_opened_image_cut_short_is_an_image():
    buffer = io.BytesIO()
    coordinates(32, 32).save(buffer, "BMP")
    with pytest.raises(ValueError, match=r"^image \(mode RGB\) cannot be turned into RGB: image file is truncated"):
        to_rgb(Image.open(io.BytesIO(buffer.getvalue()[:1000])))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (None, TypeError, "got NoneType"),
        (np.zeros((4, 4, 3), np.uint8), TypeError, "got ndarray"),
        ("missing.png", FileNotFoundError, "no image file at missing.png"),
        (".", FileNotFoundError, "no image file at ."),
        (Image.new("RGB", (0, 5)), ValueError, "image has no pixels: it is 0 x 5"),
        (one_pixel("F", float("nan")), ValueError, "values must lie in 0..65535"),
        (one_pixel("F", -0.5), ValueError, r"span -0\.5\.\.-0\.5"),
        (one_pixel("I", 65536), ValueError, r"span 65536\.\.65536"),
        (one_pixel("La", (0, 0)), ValueError, r"image \(mode La\) cannot be turned into RGB"),
    ],
)
def test_errors(wrong, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        to_rgb(wrong)


def test_a_file_that_is_no_image_is_named(tmp_path):
    path = tmp_path / "notes.png"
    path.write_text("no picture")
    with pytest.raises(ValueError, match=r"notes\.png cannot be read as an image"):
        to_rgb(path)
