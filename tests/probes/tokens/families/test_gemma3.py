"""Visual layout and attention of Gemma 3."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from probes import TokenMap, record_attention
from tests.probes.tokens.families.boxes import CoordinateImage, check_boxes
from tests.probes.tokens.families.build import tiny

PAN_AND_SCAN = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 20}


@pytest.mark.parametrize("side", ["left", "right"])
def test_gemma3_layout_boxes_match_pixels(side: str) -> None:
    rows = {"a#b": [(97, 60)], "# #": [(40, 133), (200, 21)]}
    tokens = check_boxes(tiny("gemma3"), rows, side)
    places, vision = tokens.require_places(), tokens.mask("vision")
    assert places.image[vision].tolist() == [0] * 9 + [0] * 9 + [1] * 9
    assert set(places.tile[vision].tolist()) == {0}


@pytest.mark.parametrize("side", ["left", "right"])
def test_gemma3_layout_with_pan_and_scan_returns_one_tile_per_crop(side: str) -> None:
    """Wide and tall images have 2 to 4 crops of sizes that do not divide evenly; others are not cropped."""
    rows = {"a#b": [(97, 30)], "##": [(31, 131), (40, 41)], "#and# #": [(61, 41), (40, 40), (31, 101)]}
    tokens = check_boxes(tiny("gemma3"), rows, side, **PAN_AND_SCAN)
    places = tokens.require_places()
    tile_counts = [
        [int(places.tile[row][(places.image[row] == image)].max()) + 1 for image in range(images)]
        for row, images in enumerate([1, 2, 3])
    ]
    assert tile_counts == [[4], [5, 1], [3, 1, 4]], "tiles of each image, the whole image included"


def test_gemma3_layout_without_processor_counts_crops_as_images() -> None:
    family, image = tiny("gemma3"), CoordinateImage(97, 30).image
    inputs, model = family(["#"], [[image]], **PAN_AND_SCAN), family.model()
    places = TokenMap.from_inputs(model, inputs).require_places()
    assert places.image.max() == 3
    places = TokenMap.from_inputs(model, inputs, family.processor).require_places()
    assert (places.image.max(), places.tile.max()) == (0, 3)
    assert places.box.isnan().all()
    with pytest.raises(ValueError, match=r"hold 4 images.*1 images or image_sizes"):
        TokenMap.from_inputs(model, inputs, images=[image])


def test_gemma3_layout_with_truncated_tokens_raises_value_error() -> None:
    family = tiny("gemma3")
    inputs = dict(family(["#"], [[CoordinateImage(30, 30).image]]))
    with pytest.raises(ValueError, match=r"images have 9 visual tokens.*input_ids hold 5"):
        TokenMap.from_inputs(family.model(), inputs | {"input_ids": inputs["input_ids"][:, :8], "attention_mask": None})


def test_record_attention_of_gemma3_counts_bidirectional_and_sliding_edges() -> None:
    """All tokens of an image attend to its last token, also in sliding layers. No image attends to the next image, and
    later text does not attend to keys more than 16 positions before it."""
    family = tiny("gemma3")
    images = [CoordinateImage(30, 30).image, CoordinateImage(40, 30).image]
    inputs, model = family(["##" + 20 * "?"], [images]), family.model()
    tokens = TokenMap.from_inputs(model, inputs)
    places = tokens.require_places()
    tokens = replace(tokens, labels=tokens.labels.masked_fill(places.image == 1, 5), groups=(*tokens.groups, "second"))
    with torch.no_grad(), record_attention(model, tokens) as attention:
        model(**inputs)
    vision, text = attention.targets.index("vision"), attention.targets.index("instruction")
    last = int(tokens.mask("vision")[0].nonzero()[-1])
    assert attention.received[:, 0, :, vision, last].min() > 0
    assert attention.queries[:, 0, vision, tokens.index("vision")].tolist() == [9, 9, 9]
    assert attention.queries[:, 0, vision, tokens.index("second")].tolist() == [0, 0, 0]
    # Text has 20 question marks and the 3 tokens that close the image; the 15 within the window attend to it.
    assert attention.queries[:, 0, text, tokens.index("second")].tolist() == [15, 23, 15]
