from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from probes import TokenMap, record_attention
from tests.probes.tokens.families.boxes import Picture, check_boxes
from tests.probes.tokens.families.build import tiny

PAN_AND_SCAN = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 20}


@pytest.mark.parametrize("side", ["left", "right"])
def test_boxes_are_the_pixels_of_the_tokens(side: str) -> None:
    rows = {"a#b": [(97, 60)], "# #": [(40, 133), (200, 21)]}
    tokens = check_boxes(tiny("gemma3"), rows, side)
    places, vision = tokens.require_places(), tokens.mask("vision")
    assert places.image[vision].tolist() == [0] * 9 + [0] * 9 + [1] * 9
    assert set(places.tile[vision].tolist()) == {0}


@pytest.mark.parametrize("side", ["left", "right"])
def test_crops_of_pan_and_scan(side: str) -> None:
    """Wide and tall pictures of 2 to 4 crops, of sizes that do not divide, beside pictures that are not cropped."""
    rows = {"a#b": [(97, 30)], "##": [(31, 131), (40, 41)], "#and# #": [(61, 41), (40, 40), (31, 101)]}
    tokens = check_boxes(tiny("gemma3"), rows, side, **PAN_AND_SCAN)
    places = tokens.require_places()
    pictures = [
        [int(places.tile[row][(places.image[row] == image)].max()) + 1 for image in range(images)]
        for row, images in enumerate([1, 2, 3])
    ]
    assert pictures == [[4], [5, 1], [3, 1, 4]], "tiles of each picture, itself included"


def test_without_the_processor_a_crop_counts_as_a_picture() -> None:
    family, image = tiny("gemma3"), Picture(97, 30).image
    inputs, model = family(["#"], [[image]], **PAN_AND_SCAN), family.model()
    places = TokenMap.from_inputs(model, inputs).require_places()
    assert places.image.max() == 3
    places = TokenMap.from_inputs(model, inputs, family.processor).require_places()
    assert (places.image.max(), places.tile.max()) == (0, 3)
    assert places.box.isnan().all()
    with pytest.raises(ValueError, match="the inputs hold 4 pictures, but 1 images or image_sizes are given"):
        TokenMap.from_inputs(model, inputs, images=[image])


def test_tokens_that_were_cut_off() -> None:
    family = tiny("gemma3")
    inputs = dict(family(["#"], [[Picture(30, 30).image]]))
    with pytest.raises(ValueError, match="the pictures have 9 visual tokens, input_ids 5"):
        TokenMap.from_inputs(family.model(), inputs | {"input_ids": inputs["input_ids"][:, :8], "attention_mask": None})


def test_a_picture_is_seen_both_ways_and_windows_slide() -> None:
    """All of a picture sees its last token, also where windows slide; no picture sees the next, no later text a window
    of 16 positions that lies behind."""
    family = tiny("gemma3")
    images = [Picture(30, 30).image, Picture(40, 30).image]
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
    # 20 question marks and the 3 tokens that close the picture; the last 15 before the window's end see it.
    assert attention.queries[:, 0, text, tokens.index("second")].tolist() == [15, 23, 15]
