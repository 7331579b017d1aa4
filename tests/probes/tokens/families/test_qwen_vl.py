from __future__ import annotations

import numpy as np
import pytest
import torch

from probes import TokenMap
from tests.probes.tokens.families.boxes import Picture, check_boxes, check_centres, film, seen
from tests.probes.tokens.families.build import tiny

VERSIONS = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("version", VERSIONS)
def test_boxes_are_the_pixels_of_the_tokens(version: str, side: str) -> None:
    """Smaller and larger than the smallest and largest that the processor lets pass, wide and tall."""
    rows = {"a#b": [(97, 60)], "#": [(23, 75)], "#and#in one row": [(120, 31), (9, 9)]}
    tokens = check_boxes(tiny(version), rows, side)
    places = tokens.require_places()
    assert places.image.amax(1).tolist() == [0, 0, 1]
    assert set(places.frame[tokens.mask("vision")].tolist()) == {0}
    assert set(places.tile[tokens.mask("vision")].tolist()) == {0}


def test_a_picture_is_cut_into_merged_patches() -> None:
    """48 x 24 pixels at 8 a token: 3 rows of 6."""
    tokens = check_boxes(tiny("qwen2_vl"), {"#": [(48, 24)]})
    places, vision = tokens.require_places(), tokens.mask("vision")
    assert places.row[vision].tolist() == [row for row in range(3) for _ in range(6)]
    assert places.column[vision].tolist() == 3 * list(range(6))
    assert places.box[vision][7].tolist() == [8, 8, 16, 16]


@pytest.mark.parametrize("version", VERSIONS)
def test_frames_of_a_video_between_pictures(version: str) -> None:
    """A picture, a video of 6 frames in 3 temporal patches, a picture; each frame has a blue of its own."""
    family, sizes = tiny(version), [(40, 24), (24, 32), (32, 24)]
    first, last = Picture(*sizes[0], 200).image, Picture(*sizes[2], 220).image
    video = film(*sizes[1], frames=6)
    text = f"one # two {VIDEO} three # four"
    inputs = family([text], [[first, last]], videos=[video])
    tokens = TokenMap.from_inputs(family.model(), inputs, family.processor, [first, video, last])
    places, vision = tokens.require_places(), tokens.mask("vision")

    assert places.image[vision].tolist() == [0] * 15 + [1] * 36 + [2] * 12
    frames = torch.arange(3).repeat_interleave(12)
    assert places.frame[vision].tolist() == [0] * 15 + frames.tolist() + [0] * 12
    colours = seen(family, inputs, tokens)
    blue = torch.cat([torch.full((15,), 200), frames * 40 + 10, torch.full((12,), 220)])
    np.testing.assert_allclose(colours[:, 2], blue, atol=0.1)
    check_centres(colours, tokens, np.array(sizes)[places.image[vision]])

    between = tokens.mask("instruction").clone()
    between[0, : int(vision[0].nonzero()[0])] = False
    said = family.processor.tokenizer.decode(inputs["input_ids"][between])
    assert ("seconds" in said) == (version == "qwen3_vl"), "Qwen3-VL writes the time of each temporal patch"


def test_without_the_pictures_boxes_are_not_known() -> None:
    family = tiny("qwen2_vl")
    inputs = family(["#"], [[Picture(48, 24).image]])
    places = TokenMap.from_inputs(family.model(), inputs).require_places()
    assert places.box.isnan().all()
    assert places.column.max() == 5


def test_inputs_that_do_not_fit() -> None:
    family = tiny("qwen2_vl")
    image = Picture(48, 24).image
    inputs, model = dict(family(["#"], [[image]])), family.model()
    with pytest.raises(ValueError, match="the inputs hold 1 pictures, but 2 images or image_sizes are given"):
        TokenMap.from_inputs(model, inputs, images=[image, image])
    with pytest.raises(ValueError, match="the pictures have 18 visual tokens, input_ids 9"):
        TokenMap.from_inputs(model, inputs | {"input_ids": inputs["input_ids"][:, :10], "attention_mask": None})
    with pytest.raises(ValueError, match="the pictures have 0 visual tokens, input_ids 18"):
        TokenMap.from_inputs(model, inputs | {"image_grid_thw": None})
