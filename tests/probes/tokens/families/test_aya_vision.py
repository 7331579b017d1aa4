"""Visual layout of Aya Vision."""

from __future__ import annotations

import pytest
import torch

from probes import TokenMap
from tests.probes.tokens.families.boxes import CoordinateImage, check_boxes
from tests.probes.tokens.families.build import tiny


@pytest.mark.parametrize("side", ["left", "right"])
def test_aya_vision_layout_boxes_match_pixels(side: str) -> None:
    """Images are of 6, 1, 5 and 2 tiles, two of them in one row."""
    rows = {"a#b": [(96, 64)], "#": [(16, 16)], "#and#in one row": [(100, 20), (9, 21)]}
    tokens = check_boxes(tiny("aya_vision"), rows, side)
    places, vision = tokens.require_places(), tokens.mask("vision")
    assert places.tile[0][vision[0]].tolist() == torch.arange(7).repeat_interleave(4).tolist()
    assert places.image.amax(1).tolist() == [0, 0, 1]


@pytest.mark.parametrize("size", [(100, 30), (30, 100), (17, 50), (33, 34), (200, 21), (61, 40)])
def test_aya_vision_layout_boxes_of_any_size_match_pixels(size: tuple[int, int]) -> None:
    check_boxes(tiny("aya_vision"), {"see #": [size]})


def test_aya_vision_layout_of_uncut_images_returns_whole_images() -> None:
    tokens = check_boxes(tiny("aya_vision"), {"##": [(96, 64), (20, 31)]}, crop_to_patches=False)
    places, vision = tokens.require_places(), tokens.mask("vision")
    assert places.tile[vision].unique().tolist() == [0]
    assert places.image[vision].tolist() == [0] * 4 + [1] * 4


def test_aya_vision_layout_without_image_sizes_returns_no_boxes() -> None:
    family = tiny("aya_vision")
    inputs = family(["#"], [[CoordinateImage(96, 64).image]])
    tokens = TokenMap.from_inputs(family.model(), inputs)
    places, vision = tokens.require_places(), tokens.mask("vision")
    assert places.box.isnan().all()
    assert places.tile[vision].tolist() == torch.arange(7).repeat_interleave(4).tolist()


def test_aya_vision_layout_with_mismatched_inputs_raises_value_error() -> None:
    family, image = tiny("aya_vision"), CoordinateImage(96, 64).image
    inputs, model = dict(family(["#"], [[image]])), family.model()
    with pytest.raises(ValueError, match=r"hold 1 images.*2 images or image_sizes"):
        TokenMap.from_inputs(model, inputs, images=[image, image])
