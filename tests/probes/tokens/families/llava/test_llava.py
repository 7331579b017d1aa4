from __future__ import annotations

from typing import Any

import pytest
import torch

from probes.tokens.token_map import TokenMap

SIZES = [(24, 24), (40, 100), (100, 40), (9, 13), (300, 211), (24, 200)]
PROMPT = "user : <image> what is this"


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_boxes(
    make_llava: Any, map_picture: Any, colours_of: Any, check_boxes: Any, size: tuple[int, int], pad: bool
) -> None:
    model, processor = make_llava(pad)
    picture = map_picture(*size)
    inputs = processor(images=picture, text=PROMPT, return_tensors="pt")
    tokens = TokenMap.from_inputs(model, inputs, processor, [picture])
    places = tokens.require_places()
    assert torch.equal(places.image >= 0, tokens.mask("vision"))
    check_boxes(colours_of(model, inputs), places, size, 0.02 if max(size) < 24 else 0.012)
    assert places.row[0, 2:18].tolist() == [i // 4 for i in range(16)]
    assert places.column[0, 2:18].tolist() == [i % 4 for i in range(16)]


def test_several_pictures_a_row(make_llava: Any, map_picture: Any, colours_of: Any, check_boxes: Any) -> None:
    model, processor = make_llava()
    pictures = [[map_picture(40, 100), map_picture(60, 30)], [map_picture(24, 24)]]
    texts = ["user : <image> what <image>", PROMPT]
    inputs = processor(images=pictures, text=texts, padding=True, padding_side="left", return_tensors="pt")
    tokens = TokenMap.from_inputs(model, inputs, processor, pictures)
    places = tokens.require_places()
    assert places.image[tokens.mask("vision")].tolist() == [0] * 16 + [1] * 16 + [0] * 16
    sizes = [(40, 100)] * 16 + [(60, 30)] * 16 + [(24, 24)] * 16
    check_boxes(colours_of(model, inputs), places, sizes)
    assert tokens.split("vision", by="image").groups[2:4] == ("vision_0", "vision_1")


@pytest.mark.parametrize("size", SIZES)
def test_squashed_pictures(
    make_llava: Any, map_picture: Any, colours_of: Any, check_boxes: Any, size: tuple[int, int]
) -> None:
    """As SigLIP's image processor does: both sides are resized, nothing is cropped."""
    model, processor = make_llava(size={"height": 24, "width": 24}, do_center_crop=False)
    inputs = processor(images=map_picture(*size), text=PROMPT, return_tensors="pt")
    places = TokenMap.from_inputs(model, inputs, processor, [size]).require_places()
    check_boxes(colours_of(model, inputs), places, size, 0.012 if min(size) >= 24 else 0.02)
    assert places.box[0, 2, :2].tolist() == [0, 0]
    assert places.box[0, 17, 2:].tolist() == [size[1], size[0]]


def test_a_resized_picture_smaller_than_the_crop(
    make_llava: Any, map_picture: Any, colours_of: Any, check_boxes: Any
) -> None:
    """It is padded to the size of the crop, by one pixel more at one end where the rest is odd."""
    model, processor = make_llava(size={"shortest_edge": 17})
    inputs = processor(images=map_picture(34, 36), text=PROMPT, return_tensors="pt")
    places = TokenMap.from_inputs(model, inputs, processor, [(34, 36)]).require_places()
    check_boxes(colours_of(model, inputs), places, (34, 36), 0.02)


def test_a_class_token_has_no_place(make_llava: Any, map_picture: Any) -> None:
    model, processor = make_llava(strategy="full")
    inputs = processor(images=[map_picture(24, 24)] * 2, text=[PROMPT] * 2, return_tensors="pt")
    tokens = TokenMap.from_inputs(model, inputs, processor, [(24, 24)] * 2)
    places = tokens.require_places()
    for row in range(2):
        assert places.row[row, tokens.mask("vision")[row]].tolist() == [-1] + [i // 4 for i in range(16)]
        assert places.box[row, 2].isnan().all()
        assert places.box[row, 3].tolist() == [0, 0, 6, 6]
    assert places.image[tokens.mask("vision")].tolist() == [0] * 34


def test_without_processor_or_sizes_there_is_a_grid_without_boxes(make_llava: Any, map_picture: Any) -> None:
    model, processor = make_llava()
    inputs = processor(images=map_picture(40, 100), text=PROMPT, return_tensors="pt")
    known = TokenMap.from_inputs(model, inputs, processor, [(40, 100)]).require_places()
    _, other = make_llava(crop_size={"height": 30, "width": 30})  # has not made these inputs
    for arguments in ((None, [(40, 100)]), (processor, None), (other, [(40, 100)])):
        places = TokenMap.from_inputs(model, inputs, *arguments).require_places()
        assert places.box.isnan().all()
        assert torch.equal(places.row, known.row)
        assert torch.equal(places.column, known.column)


def test_a_tower_without_a_fixed_grid_has_no_places(make_llava: Any, map_picture: Any) -> None:
    model, processor = make_llava()
    inputs = processor(images=map_picture(24, 24), text=PROMPT, return_tensors="pt")
    model.config.vision_config.model_type = "pixtral"
    tokens = TokenMap.from_inputs(model, inputs)
    assert int(tokens.mask("vision").sum()) == 16
    with pytest.raises(ValueError, match="no places of visual tokens for model_type 'llava'"):
        tokens.require_places()


def test_without_pixels_there_are_groups_and_no_places(make_llava: Any, map_picture: Any) -> None:
    """As for a decoder that is called with embeddings."""
    model, processor = make_llava()
    inputs = dict(processor(images=map_picture(24, 24), text=PROMPT, return_tensors="pt"))
    tokens = TokenMap.from_inputs(model, inputs | {"pixel_values": None}, processor)
    assert torch.equal(tokens.labels, TokenMap.from_inputs(model, inputs).labels)
    with pytest.raises(ValueError, match="for model_type 'llava': its inputs held no pixels, or it is a variant"):
        tokens.split("vision", by="image")


def test_inputs_that_do_not_fit(make_llava: Any, map_picture: Any) -> None:
    model, processor = make_llava()
    inputs = dict(processor(images=map_picture(24, 24), text=PROMPT, return_tensors="pt"))
    for changed, images, message in (
        ({}, [(24, 24)] * 2, "the inputs hold 1 pictures, but 2 images or image_sizes are given"),
        (
            {"input_ids": inputs["input_ids"][:, :10], "attention_mask": None},
            None,
            "have 16 visual tokens, input_ids 8",
        ),
        ({"pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1)}, None, "have 32 visual tokens, input_ids 16"),
    ):
        with pytest.raises(ValueError, match=message):
            TokenMap.from_inputs(model, inputs | changed, processor, images)


def test_the_model_takes_the_inputs(make_llava: Any, map_picture: Any) -> None:
    """The stand-in for the tower was put back, and the processor fits the model."""
    model, processor = make_llava()
    inputs = processor(images=map_picture(24, 24), text=PROMPT, return_tensors="pt")
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()
