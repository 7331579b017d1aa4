"""Tiles: cutting and stitching, on images whose pixels encode their own coordinates."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_mini.images import pad_to_square
from llava_mini.tiles import cut_into_tiles, stitch_tiles
from tests.llava_mini.coordinate_image import coordinates

MEAN = (122, 116, 104)
sizes = st.tuples(st.integers(1, 60), st.integers(1, 60)) | st.sampled_from([(4000, 20), (20, 4000), (1, 4000)])


@given(size=sizes, tiles=st.integers(2, 5))
@settings(max_examples=40)
def test_cut_into_tiles_returns_slices_in_row_major_order(size, tiles):
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


def test_cut_into_tiles_leaves_remaining_pixels_to_the_whole_image():
    crops = cut_into_tiles(coordinates(5, 7), 2)
    assert [crop.size for crop in crops] == [(2, 3)] * 4 + [(5, 7)]
    assert [crop.getpixel((0, 0))[:2] for crop in crops] == [(0, 0), (2, 0), (0, 3), (2, 3), (0, 0)]


def test_cut_into_tiles_of_a_side_shorter_than_the_tiles_returns_single_pixels():
    *crops, _ = cut_into_tiles(coordinates(2, 9), 3)
    assert [crop.size for crop in crops] == [(1, 3)] * 9
    assert [crop.getpixel((0, 0))[0] for crop in crops[:3]] == [0, 1, 1]


def test_cut_into_tiles_with_one_tile_returns_the_image_once():
    image = coordinates(4, 3)
    (only,) = cut_into_tiles(image, 1)
    assert only is image


@pytest.mark.parametrize("tiles", [0, -1, 2.0, None])
def test_cut_into_tiles_with_a_wrong_number_raises(tiles):
    with pytest.raises(ValueError, match=f"tiles .*at least 1.*{tiles}"):
        cut_into_tiles(coordinates(4, 4), tiles)


def test_cut_into_tiles_after_padding_divides_the_border_among_tiles():
    *crops, whole = cut_into_tiles(pad_to_square(coordinates(4, 2), MEAN), 2)
    assert whole.size == (4, 4)
    for crop, (left, row_of_image) in zip(crops, [(0, 1), (2, 1), (0, 0), (2, 0)], strict=True):
        assert crop.size == (2, 2)
        assert crop.getpixel((0, 1 - row_of_image)) == MEAN
        assert crop.getpixel((0, row_of_image))[0] == left


@given(frames=st.integers(1, 3), tiles=st.integers(1, 4), side=st.integers(1, 4), width=st.integers(1, 3))
@settings(max_examples=30)
def test_stitch_tiles_puts_every_patch_at_its_grid_index(frames, tiles, side, width):
    total = tiles * side
    features = torch.empty(frames, tiles**2, side**2, width, dtype=torch.long)
    for frame, tile, patch, channel in np.ndindex(*features.shape):
        row = tile // tiles * side + patch // side
        column = tile % tiles * side + patch % side
        features[frame, tile, patch, channel] = ((frame * total + row) * total + column) * width + channel
    expected = torch.arange(frames * total**2 * width).reshape(frames, total**2, width)
    assert torch.equal(stitch_tiles(features, tiles), expected)


def test_stitch_tiles_inverts_cut_into_tiles():
    image = coordinates(12, 12)
    crops = np.stack([np.asarray(crop).reshape(16, 3) for crop in cut_into_tiles(image, 3)[:-1]])
    np.testing.assert_array_equal(
        stitch_tiles(torch.from_numpy(crops)[None], 3)[0].reshape(12, 12, 3), np.asarray(image)
    )


@pytest.mark.parametrize(("num_tiles", "patches"), [(5, 4), (4, 6)])
def test_stitch_tiles_with_a_wrong_shape_raises(num_tiles, patches):
    with pytest.raises(ValueError, match=f"{num_tiles} tiles of {patches} patches"):
        stitch_tiles(torch.zeros(1, num_tiles, patches, 2), 2)
