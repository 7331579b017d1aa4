"""Visual layout and attention of PaliGemma."""

from __future__ import annotations

import pytest
import torch

from probes import TokenMap, record_attention
from tests.probes.tokens.families.boxes import CoordinateImage, check_boxes
from tests.probes.tokens.families.build import tiny


@pytest.mark.parametrize("side", ["left", "right"])
def test_paligemma_layout_boxes_match_pixels(side: str) -> None:
    """Images of any aspect ratio become squares; the tokens of two images in a row are adjacent."""
    rows = {"#ab": [(97, 60)], "##": [(40, 133), (200, 21)]}
    tokens = check_boxes(tiny("paligemma"), rows, side)
    places, vision = tokens.require_places(), tokens.mask("vision")
    assert places.image[vision].tolist() == [0] * 25 + [0] * 25 + [1] * 25
    assert places.box[vision][6].tolist() == pytest.approx([97 / 5, 60 / 5, 2 * 97 / 5, 2 * 60 / 5])


def test_paligemma_layout_of_padded_row_returns_no_image() -> None:
    family, image = tiny("paligemma"), CoordinateImage(30, 30).image
    inputs = dict(family(["#ab", "#ab"], [[image], [image]]))
    inputs["attention_mask"][0] = 0
    places = TokenMap.from_inputs(family.model(), inputs, images=[image]).require_places()
    assert places.image.amax(1).tolist() == [-1, 0]


def test_from_inputs_of_paligemma_with_suffix_returns_response() -> None:
    family = tiny("paligemma")
    inputs = family(["#what"], [[CoordinateImage(30, 30).image]], suffix=["cat"])
    tokens = TokenMap.from_inputs(family.model(), inputs)
    assert family.processor.tokenizer.decode(inputs["input_ids"][tokens.mask("response")]) == "cat<eos>"


def test_paligemma_layout_with_mismatched_inputs_raises_value_error() -> None:
    family, image = tiny("paligemma"), CoordinateImage(30, 30).image
    inputs, model = dict(family(["#"], [[image]])), family.model()
    with pytest.raises(ValueError, match=r"hold 1 images.*2 images or image_sizes"):
        TokenMap.from_inputs(model, inputs, images=[image, image])
    with pytest.raises(ValueError, match=r"images have 0 visual tokens.*input_ids hold 20"):
        TokenMap.from_inputs(
            model, inputs | {"input_ids": inputs["input_ids"][:, :20], "attention_mask": None, "labels": None}
        )


def test_record_attention_of_paligemma_counts_bidirectional_prefix() -> None:
    """The prefix is not causal, so image tokens attend to the question after them."""
    family = tiny("paligemma")
    inputs, model = family(["#what is it"], [[CoordinateImage(30, 30).image]]), family.model()
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad(), record_attention(model, tokens, targets=["vision"]) as attention:
        model(**inputs)
    assert (attention.mass[..., tokens.index("instruction")] > 0).all()
    assert torch.equal(attention.queries[..., tokens.index("instruction")], torch.full((3, 1, 1), 25.0))
