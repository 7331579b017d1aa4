from __future__ import annotations

import pytest
import torch

from probes import TokenMap, record_attention
from tests.probes.tokens.families.boxes import Picture, check_boxes
from tests.probes.tokens.families.build import tiny


@pytest.mark.parametrize("side", ["left", "right"])
def test_boxes_are_the_pixels_of_the_tokens(side: str) -> None:
    """Squashed, whatever the shape; the tokens of two pictures in a row touch."""
    rows = {"#ab": [(97, 60)], "##": [(40, 133), (200, 21)]}
    tokens = check_boxes(tiny("paligemma"), rows, side)
    places, vision = tokens.require_places(), tokens.mask("vision")
    assert places.image[vision].tolist() == [0] * 25 + [0] * 25 + [1] * 25
    assert places.box[vision][6].tolist() == pytest.approx([97 / 5, 60 / 5, 2 * 97 / 5, 2 * 60 / 5])


def test_a_row_that_is_all_padding_has_no_picture() -> None:
    family, image = tiny("paligemma"), Picture(30, 30).image
    inputs = dict(family(["#ab", "#ab"], [[image], [image]]))
    inputs["attention_mask"][0] = 0
    places = TokenMap.from_inputs(family.model(), inputs, images=[image]).require_places()
    assert places.image.amax(1).tolist() == [-1, 0]


def test_the_answer_to_learn_is_the_response() -> None:
    family = tiny("paligemma")
    inputs = family(["#what"], [[Picture(30, 30).image]], suffix=["cat"])
    tokens = TokenMap.from_inputs(family.model(), inputs)
    assert family.processor.tokenizer.decode(inputs["input_ids"][tokens.mask("response")]) == "cat<eos>"


def test_inputs_that_do_not_fit() -> None:
    family, image = tiny("paligemma"), Picture(30, 30).image
    inputs, model = dict(family(["#"], [[image]])), family.model()
    with pytest.raises(ValueError, match="the inputs hold 1 pictures, but 2 images or image_sizes are given"):
        TokenMap.from_inputs(model, inputs, images=[image, image])
    with pytest.raises(ValueError, match="the pictures have 0 visual tokens, input_ids 20"):
        TokenMap.from_inputs(
            model, inputs | {"input_ids": inputs["input_ids"][:, :20], "attention_mask": None, "labels": None}
        )


def test_the_prompt_is_seen_both_ways() -> None:
    """Its prefix is not causal: the picture attends to the question behind it, and the record says so."""
    family = tiny("paligemma")
    inputs, model = family(["#what is it"], [[Picture(30, 30).image]]), family.model()
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad(), record_attention(model, tokens, targets=["vision"]) as attention:
        model(**inputs)
    assert (attention.mass[..., tokens.index("instruction")] > 0).all()
    assert torch.equal(attention.queries[..., tokens.index("instruction")], torch.full((3, 1, 1), 25.0))
