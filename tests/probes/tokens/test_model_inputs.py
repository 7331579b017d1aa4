"""Facts read from the inputs of a model call: image sizes, pixels and reading order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from probes.tokens.model_inputs import original_image_sizes, reading_order, require_pixels, size_of_image


@pytest.mark.parametrize(
    ("image", "sizes"),
    [
        (Image.new("RGB", (20, 10)), [(10, 20)]),
        (np.zeros((10, 20, 3)), [(10, 20)]),
        (torch.zeros(3, 10, 20), [(10, 20)]),
        (np.zeros((10, 20)), [(10, 20)]),
        (np.zeros((5, 10, 20, 3)), [(10, 20)]),
        ((10, 20), [(10, 20)]),
        ([Image.new("L", (20, 10)), (30, 40)], [(10, 20), (30, 40)]),
        ([], []),
    ],
)
def test_original_image_sizes_with_images_returns_height_and_width(image: Any, sizes: list[tuple[int, int]]) -> None:
    inputs = {"image_sizes": torch.tensor([[1, 2]])}
    assert original_image_sizes(inputs, [image]) == sizes, "images take precedence over image_sizes"


def test_original_image_sizes_without_images_returns_image_sizes_of_inputs() -> None:
    assert original_image_sizes({"image_sizes": torch.tensor([[1, 2], [3, 4]])}, None) == [(1, 2), (3, 4)]
    assert original_image_sizes({}, None) is None


def test_original_image_sizes_with_unknown_type_raises_value_error() -> None:
    with pytest.raises(ValueError, match=r"type str; pass a PIL image, an array or \(height, width\)"):
        original_image_sizes({}, ["cat.png"])


@pytest.mark.parametrize("images", [Image.new("RGB", (4, 4)), "cat.png"])
def test_original_image_sizes_of_what_is_no_list_raises_type_error(images) -> None:
    with pytest.raises(TypeError, match=rf"images: found a {type(images).__name__}"):
        original_image_sizes({}, images)


def test_size_of_image_with_wrong_number_of_sizes_raises_value_error() -> None:
    with pytest.raises(ValueError, match=r"hold 3 images.*2 images or image_sizes"):
        size_of_image([(1, 2), (3, 4)], 0, 3)


def test_require_pixels_without_pixels_raises_value_error() -> None:
    with pytest.raises(ValueError, match="inputs have no pixel_values"):
        require_pixels({"pixel_values": None})


def test_reading_order_with_two_token_ids_skips_unattended_tokens() -> None:
    ids = torch.tensor([[7, 7, 8, 8, 8, 0, 7], [0, 0, 8, 0, 7, 7, 7]])
    mask = torch.tensor([[1] * 7, [0, 0, 1, 1, 0, 1, 1]])
    order = reading_order({"input_ids": ids, "attention_mask": mask}, {7: [2, 1, 2], 8: [3, 1]})
    assert order == [(7, 0), (8, 0), (7, 1), (8, 1), (7, 2)]


def test_reading_order_with_surplus_tokens_ignores_them() -> None:
    """`Places.from_grids` reports the surplus."""
    ids = torch.tensor([[7, 7, 8, 8, 8, 0, 7], [0, 0, 8, 0, 7, 7, 7]])
    assert reading_order({"input_ids": ids}, {7: [2]}) == [(7, 0)]
