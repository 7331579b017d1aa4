"""Visual layout of InternVL."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from probes import TokenMap
from tests.probes.tokens.families.boxes import CoordinateImage, check_boxes, check_centres, make_video, pixel_colours
from tests.probes.tokens.families.build import tiny


@pytest.mark.parametrize("side", ["left", "right"])
def test_internvl_layout_boxes_match_pixels(side: str) -> None:
    rows = {"a#b": [(97, 60)], "##": [(40, 133), (64, 64)], "#and#": [(200, 30), (12, 15)]}
    tokens = check_boxes(tiny("internvl"), rows, side)
    assert tokens.require_places().image.amax(1).tolist() == [0, 1, 1]


@pytest.mark.parametrize("size", [(97, 66), (66, 97), (96, 64), (64, 96), (50, 53), (21, 140), (140, 43), (160, 120)])
def test_internvl_layout_of_many_tiles_returns_arrangement_of_image_processor(size: tuple[int, int]) -> None:
    """Up to 12 tiles, whose count alone does not determine their arrangement."""
    check_boxes(tiny("internvl"), {"#": [size]}, max_patches=12)


def test_internvl_layout_of_uncut_image_returns_one_tile() -> None:
    tokens = check_boxes(tiny("internvl"), {"##": [(97, 60), (30, 90)]}, crop_to_patches=False)
    places, vision = tokens.require_places(), tokens.mask("vision")
    assert places.image[vision].tolist() == [0] * 4 + [1] * 4
    assert set(places.tile[vision].tolist()) == {0}


def test_internvl_layout_without_image_size_returns_no_boxes() -> None:
    family = tiny("internvl")
    inputs = family(["#"], [[CoordinateImage(96, 64).image]])
    tokens = TokenMap.from_inputs(family.model(), inputs)
    places = tokens.require_places()
    vision = tokens.mask("vision")
    assert places.tile[vision].tolist() == torch.arange(7).repeat_interleave(4).tolist()
    assert places.row[vision].tolist() == 7 * [0, 0, 1, 1]
    assert places.box.isnan().all()


def test_internvl_layout_with_typed_frame_text_starts_new_image_per_row() -> None:
    family, image = tiny("internvl"), CoordinateImage(16, 16).image
    inputs = family(["#", "someone typed Frame2: #"], [[image], [image]], "right")
    places = TokenMap.from_inputs(family.model(), inputs, family.processor).require_places()
    assert places.frame.amax(1).tolist() == [0, 0]


def test_internvl_layout_with_mismatched_inputs_raises_value_error() -> None:
    family, image = tiny("internvl"), CoordinateImage(96, 64).image
    inputs, model = dict(family(["#"], [[image]])), family.model()
    with pytest.raises(ValueError, match=r"hold 1 images.*2 images or image_sizes"):
        TokenMap.from_inputs(model, inputs, images=[image, image])
    with pytest.raises(ValueError, match=r"runs of \[\d+\], not multiples of the 4 tokens of a tile"):
        TokenMap.from_inputs(model, inputs | {"input_ids": inputs["input_ids"][:, :20], "attention_mask": None})


def test_internvl_layout_of_videos_and_image_returns_frames() -> None:
    """The rows have a video of 3 frames, an image of 7 tiles, and two videos."""
    family, sizes = tiny("internvl"), [(40, 24), (96, 64), (24, 50), (30, 30)]
    videos = [make_video(*sizes[number], 3, blue=60 * number) for number in (0, 2, 3)]
    image = CoordinateImage(*sizes[1], 60).image
    inputs = family(["a <video> b", "#", "<video><video>"], [[image]], videos=videos)
    model = family.model()
    tokens = TokenMap.from_inputs(model, inputs, family.processor, [videos[0], image, *videos[1:]])
    places, vision = tokens.require_places(), tokens.mask("vision")
    three_frames = torch.arange(3).repeat_interleave(4).tolist()
    assert places.frame[vision].tolist() == three_frames + [0] * 28 + three_frames + three_frames
    assert places.image[vision].tolist() == [0] * (12 + 28 + 12) + [1] * 12

    colours, index = pixel_colours(family, inputs, tokens), vision.nonzero()[:, 0] + places.image[vision]
    blue = 60 * index + 20 * places.frame[vision]
    np.testing.assert_allclose(colours[:, 2], blue, atol=0.1)
    check_centres(colours, tokens, np.array(sizes)[index])
    without_processor = TokenMap.from_inputs(model, inputs).require_places()
    assert without_processor.image.amax(1).tolist() == [2, 0, 5], "without the processor each frame counts as an image"
