from __future__ import annotations

import numpy as np
import pytest
import torch

from probes import TokenMap
from tests.probes.tokens.families.boxes import Picture, check_boxes, check_centres, film, seen
from tests.probes.tokens.families.build import tiny


@pytest.mark.parametrize("side", ["left", "right"])
def test_boxes_are_the_pixels_of_the_tokens(side: str) -> None:
    rows = {"a#b": [(97, 60)], "##": [(40, 133), (64, 64)], "#and#": [(200, 30), (12, 15)]}
    tokens = check_boxes(tiny("internvl"), rows, side)
    assert tokens.require_places().image.amax(1).tolist() == [0, 1, 1]


@pytest.mark.parametrize("size", [(97, 66), (66, 97), (96, 64), (64, 96), (50, 53), (21, 140), (140, 43), (160, 120)])
def test_tiles_lie_as_the_image_processor_laid_them(size: tuple[int, int]) -> None:
    """Up to 12 tiles, whose count alone does not say how they lie."""
    check_boxes(tiny("internvl"), {"#": [size]}, max_patches=12)


def test_a_picture_that_is_not_cut_is_one_tile() -> None:
    tokens = check_boxes(tiny("internvl"), {"##": [(97, 60), (30, 90)]}, crop_to_patches=False)
    places, vision = tokens.require_places(), tokens.mask("vision")
    assert places.image[vision].tolist() == [0] * 4 + [1] * 4
    assert set(places.tile[vision].tolist()) == {0}


def test_without_its_size_a_picture_has_tiles_without_boxes() -> None:
    family = tiny("internvl")
    inputs = family(["#"], [[Picture(96, 64).image]])
    tokens = TokenMap.from_inputs(family.model(), inputs)
    places = tokens.require_places()
    vision = tokens.mask("vision")
    assert places.tile[vision].tolist() == torch.arange(7).repeat_interleave(4).tolist()
    assert places.row[vision].tolist() == 7 * [0, 0, 1, 1]
    assert places.box.isnan().all()


def test_the_first_picture_of_a_row_is_no_frame_of_the_row_before() -> None:
    family, image = tiny("internvl"), Picture(16, 16).image
    inputs = family(["#", "someone typed Frame2: #"], [[image], [image]], "right")
    places = TokenMap.from_inputs(family.model(), inputs, family.processor).require_places()
    assert places.frame.amax(1).tolist() == [0, 0]


def test_inputs_that_do_not_fit() -> None:
    family, image = tiny("internvl"), Picture(96, 64).image
    inputs, model = dict(family(["#"], [[image]])), family.model()
    with pytest.raises(ValueError, match="the inputs hold 1 pictures, but 2 images or image_sizes are given"):
        TokenMap.from_inputs(model, inputs, images=[image, image])
    with pytest.raises(ValueError, match="no whole number of tiles of 4"):
        TokenMap.from_inputs(model, inputs | {"input_ids": inputs["input_ids"][:, :20], "attention_mask": None})


def test_frames_of_videos_beside_a_picture() -> None:
    """A video of 3 frames, a picture of 7 tiles, and two videos in a row."""
    family, sizes = tiny("internvl"), [(40, 24), (96, 64), (24, 50), (30, 30)]
    films = [film(*sizes[number], 3, blue=60 * number) for number in (0, 2, 3)]
    image = Picture(*sizes[1], 60).image
    inputs = family(["a <video> b", "#", "<video><video>"], [[image]], videos=films)
    model = family.model()
    tokens = TokenMap.from_inputs(model, inputs, family.processor, [films[0], image, *films[1:]])
    places, vision = tokens.require_places(), tokens.mask("vision")
    threes = torch.arange(3).repeat_interleave(4).tolist()
    assert places.frame[vision].tolist() == threes + [0] * 28 + threes + threes
    assert places.image[vision].tolist() == [0] * (12 + 28 + 12) + [1] * 12

    colours, picture = seen(family, inputs, tokens), vision.nonzero()[:, 0] + places.image[vision]
    blue = 60 * picture + 20 * places.frame[vision]
    np.testing.assert_allclose(colours[:, 2], blue, atol=0.1)
    check_centres(colours, tokens, np.array(sizes)[picture])
    alone = TokenMap.from_inputs(model, inputs).require_places()
    assert alone.image.amax(1).tolist() == [2, 0, 5], "without the processor each frame is a picture"
