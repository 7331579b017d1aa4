"""Visual layout of LLaVA-1.5."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from probes.tokens.token_map import TokenMap

SIZES = [(24, 24), (40, 100), (100, 40), (9, 13), (300, 211), (24, 200)]
PROMPT = "user : <image> what is this"


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_llava_layout_boxes_match_colours(
    make_llava: Any, coordinate_image: Any, token_colours: Any, check_boxes: Any, size: tuple[int, int], pad: bool
) -> None:
    model, processor = make_llava(pad)
    image = coordinate_image(*size)
    inputs = processor(images=image, text=PROMPT, return_tensors="pt")
    tokens = TokenMap.from_inputs(model, inputs, processor, [image])
    places = tokens.require_places()
    assert torch.equal(places.image >= 0, tokens.mask("vision"))
    check_boxes(token_colours(model, inputs), places, size, 0.02 if max(size) < 24 else 0.012)
    assert places.row[0, 2:18].tolist() == [i // 4 for i in range(16)]
    assert places.column[0, 2:18].tolist() == [i % 4 for i in range(16)]


def test_llava_layout_of_several_images_per_row_counts_images(
    make_llava: Any, coordinate_image: Any, token_colours: Any, check_boxes: Any
) -> None:
    model, processor = make_llava()
    images = [[coordinate_image(40, 100), coordinate_image(60, 30)], [coordinate_image(24, 24)]]
    texts = ["user : <image> what <image>", PROMPT]
    inputs = processor(images=images, text=texts, padding=True, padding_side="left", return_tensors="pt")
    tokens = TokenMap.from_inputs(model, inputs, processor, images)
    places = tokens.require_places()
    assert places.image[tokens.mask("vision")].tolist() == [0] * 16 + [1] * 16 + [0] * 16
    sizes = [(40, 100)] * 16 + [(60, 30)] * 16 + [(24, 24)] * 16
    check_boxes(token_colours(model, inputs), places, sizes)
    assert tokens.split("vision", by="image").groups[2:4] == ("vision_0", "vision_1")


@pytest.mark.parametrize("size", SIZES)
def test_llava_layout_of_squashed_image_boxes_match_colours(
    make_llava: Any, coordinate_image: Any, token_colours: Any, check_boxes: Any, size: tuple[int, int]
) -> None:
    """SigLIP's image processor resizes both sides and crops nothing."""
    model, processor = make_llava(size={"height": 24, "width": 24}, do_center_crop=False)
    inputs = processor(images=coordinate_image(*size), text=PROMPT, return_tensors="pt")
    places = TokenMap.from_inputs(model, inputs, processor, [size]).require_places()
    check_boxes(token_colours(model, inputs), places, size, 0.012 if min(size) >= 24 else 0.02)
    assert places.box[0, 2, :2].tolist() == [0, 0]
    assert places.box[0, 17, 2:].tolist() == [size[1], size[0]]


def test_llava_layout_of_image_smaller_than_crop_boxes_match_colours(
    make_llava: Any, coordinate_image: Any, token_colours: Any, check_boxes: Any
) -> None:
    """Padding fills the crop; an odd remainder puts one more pixel at one end."""
    model, processor = make_llava(size={"shortest_edge": 17})
    inputs = processor(images=coordinate_image(34, 36), text=PROMPT, return_tensors="pt")
    places = TokenMap.from_inputs(model, inputs, processor, [(34, 36)]).require_places()
    check_boxes(token_colours(model, inputs), places, (34, 36), 0.02)


def test_llava_layout_with_class_token_returns_no_box_for_it(make_llava: Any, coordinate_image: Any) -> None:
    model, processor = make_llava(strategy="full")
    inputs = processor(images=[coordinate_image(24, 24)] * 2, text=[PROMPT] * 2, return_tensors="pt")
    tokens = TokenMap.from_inputs(model, inputs, processor, [(24, 24)] * 2)
    places = tokens.require_places()
    for row in range(2):
        assert places.row[row, tokens.mask("vision")[row]].tolist() == [-1] + [i // 4 for i in range(16)]
        assert places.box[row, 2].isnan().all()
        assert places.box[row, 3].tolist() == [0, 0, 6, 6]
    assert places.image[tokens.mask("vision")].tolist() == [0] * 34


def test_llava_layout_without_processor_or_sizes_returns_no_boxes(make_llava: Any, coordinate_image: Any) -> None:
    model, processor = make_llava()
    inputs = processor(images=coordinate_image(40, 100), text=PROMPT, return_tensors="pt")
    complete = TokenMap.from_inputs(model, inputs, processor, [(40, 100)]).require_places()
    _, other = make_llava(crop_size={"height": 30, "width": 30})  # a processor that did not produce these inputs
    for arguments in ((None, [(40, 100)]), (processor, None), (other, [(40, 100)])):
        places = TokenMap.from_inputs(model, inputs, *arguments).require_places()
        assert places.box.isnan().all()
        assert torch.equal(places.row, complete.row)
        assert torch.equal(places.column, complete.column)


def test_from_inputs_with_pixtral_vision_tower_without_sizes_raises(make_llava: Any, coordinate_image: Any) -> None:
    model, processor = make_llava()
    inputs = processor(images=coordinate_image(24, 24), text=PROMPT, return_tensors="pt")
    model.config.vision_config.model_type = "pixtral"
    with pytest.raises(ValueError, match="inputs have no image_sizes"):
        TokenMap.from_inputs(model, inputs)


def test_from_inputs_without_pixels_returns_groups_without_places(make_llava: Any, coordinate_image: Any) -> None:
    """A decoder that is called with embeddings has no pixels either."""
    model, processor = make_llava()
    inputs = dict(processor(images=coordinate_image(24, 24), text=PROMPT, return_tensors="pt"))
    tokens = TokenMap.from_inputs(model, inputs | {"pixel_values": None}, processor)
    assert torch.equal(tokens.labels, TokenMap.from_inputs(model, inputs).labels)
    with pytest.raises(ValueError, match="model_type 'llava': its inputs held no pixels"):
        tokens.split("vision", by="image")


def test_llava_layout_with_mismatched_inputs_raises_value_error(make_llava: Any, coordinate_image: Any) -> None:
    model, processor = make_llava()
    inputs = dict(processor(images=coordinate_image(24, 24), text=PROMPT, return_tensors="pt"))
    for changed, images, message in (
        ({}, [(24, 24)] * 2, r"hold 1 images.*2 images or image_sizes"),
        (
            {"input_ids": inputs["input_ids"][:, :10], "attention_mask": None},
            None,
            r"have 16 visual tokens.*input_ids hold 8",
        ),
        (
            {"pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1)},
            None,
            r"have 32 visual tokens.*input_ids hold 16",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            TokenMap.from_inputs(model, inputs | changed, processor, images)


def test_llava_after_stand_in_vision_tower_returns_finite_logits(make_llava: Any, coordinate_image: Any) -> None:
    """The vision tower is restored, and the processor fits the model."""
    model, processor = make_llava()
    inputs = processor(images=coordinate_image(24, 24), text=PROMPT, return_tensors="pt")
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()
