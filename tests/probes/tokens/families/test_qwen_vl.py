"""Visual layout of Qwen2-VL, Qwen2.5-VL and Qwen3-VL."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from probes import TokenMap
from tests.probes.tokens.families.boxes import CoordinateImage, check_boxes, check_centres, make_video, pixel_colours
from tests.probes.tokens.families.build import tiny

MODEL_TYPES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_qwen_vl_layout_boxes_match_pixels(model_type: str, side: str) -> None:
    """Images are wide and tall, and smaller and larger than the limits of the processor."""
    rows = {"a#b": [(97, 60)], "#": [(23, 75)], "#and#in one row": [(120, 31), (9, 9)]}
    tokens = check_boxes(tiny(model_type), rows, side)
    places = tokens.require_places()
    assert places.image.amax(1).tolist() == [0, 0, 1]
    assert set(places.frame[tokens.mask("vision")].tolist()) == {0}
    assert set(places.tile[tokens.mask("vision")].tolist()) == {0}


def test_qwen_vl_layout_returns_grid_of_merged_patches() -> None:
    """48 x 24 pixels at 8 pixels per token give 3 rows of 6."""
    tokens = check_boxes(tiny("qwen2_vl"), {"#": [(48, 24)]})
    places, vision = tokens.require_places(), tokens.mask("vision")
    assert places.row[vision].tolist() == [row for row in range(3) for _ in range(6)]
    assert places.column[vision].tolist() == 3 * list(range(6))
    assert places.box[vision][7].tolist() == [8, 8, 16, 16]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_qwen_vl_layout_of_video_between_images_returns_temporal_patches(model_type: str) -> None:
    """The video has 6 frames in 3 temporal patches; each frame has its own blue."""
    family, sizes = tiny(model_type), [(40, 24), (24, 32), (32, 24)]
    first, last = CoordinateImage(*sizes[0], 200).image, CoordinateImage(*sizes[2], 220).image
    video = make_video(*sizes[1], frames=6)
    text = f"one # two {VIDEO} three # four"
    inputs = family([text], [[first, last]], videos=[video])
    tokens = TokenMap.from_inputs(family.model(), inputs, family.processor, [first, video, last])
    places, vision = tokens.require_places(), tokens.mask("vision")

    assert places.image[vision].tolist() == [0] * 15 + [1] * 36 + [2] * 12
    frames = torch.arange(3).repeat_interleave(12)
    assert places.frame[vision].tolist() == [0] * 15 + frames.tolist() + [0] * 12
    colours = pixel_colours(family, inputs, tokens)
    blue = torch.cat([torch.full((15,), 200), frames * 40 + 10, torch.full((12,), 220)])
    np.testing.assert_allclose(colours[:, 2], blue, atol=0.1)
    check_centres(colours, tokens, np.array(sizes)[places.image[vision]])

    between = tokens.mask("instruction").clone()
    between[0, : int(vision[0].nonzero()[0])] = False
    text_between = family.processor.tokenizer.decode(inputs["input_ids"][between])
    assert ("seconds" in text_between) == (model_type == "qwen3_vl"), (
        "only Qwen3-VL writes the time of each temporal patch"
    )


def test_qwen_vl_layout_without_image_sizes_returns_no_boxes() -> None:
    family = tiny("qwen2_vl")
    inputs = family(["#"], [[CoordinateImage(48, 24).image]])
    places = TokenMap.from_inputs(family.model(), inputs).require_places()
    assert places.box.isnan().all()
    assert places.column.max() == 5


def test_qwen_vl_layout_with_mismatched_inputs_raises_value_error() -> None:
    family = tiny("qwen2_vl")
    image = CoordinateImage(48, 24).image
    inputs, model = dict(family(["#"], [[image]])), family.model()
    with pytest.raises(ValueError, match=r"hold 1 images.*2 images or image_sizes"):
        TokenMap.from_inputs(model, inputs, images=[image, image])
    with pytest.raises(ValueError, match=r"images have 18 visual tokens.*input_ids hold 9"):
        TokenMap.from_inputs(model, inputs | {"input_ids": inputs["input_ids"][:, :10], "attention_mask": None})
    with pytest.raises(ValueError, match=r"images have 0 visual tokens.*input_ids hold 18"):
        TokenMap.from_inputs(model, inputs | {"image_grid_thw": None})
