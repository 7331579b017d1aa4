"""Visual layout of Mistral 3 and of LLaVA with a Pixtral vision tower."""

from __future__ import annotations

import pytest

from probes import TokenMap
from tests.probes.tokens.families.boxes import CoordinateImage, check_boxes
from tests.probes.tokens.families.build import tiny

MODEL_TYPES = ["mistral3", "pixtral"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_pixtral_layout_boxes_match_pixels(model_type: str, side: str) -> None:
    """Images are wide and tall, and smaller and larger than the longest edge; two of them are in one row."""
    rows = {"a#b": [(97, 60)], "#": [(23, 75)], "#and#in one row": [(120, 31), (9, 9)]}
    tokens = check_boxes(tiny(model_type), rows, side)
    assert tokens.require_places().image.amax(1).tolist() == [0, 0, 1]


def test_pixtral_layout_returns_grid_of_merged_patches() -> None:
    """40 x 24 pixels at 8 pixels per merged patch give 3 rows of 5; the break tokens between rows are text."""
    tokens = check_boxes(tiny("mistral3"), {"#": [(80, 48)]})
    places, vision = tokens.require_places(), tokens.mask("vision")
    assert places.row[vision].tolist() == [row for row in range(3) for _ in range(5)]
    assert places.column[vision].tolist() == 3 * list(range(5))
    assert places.box[vision][7].tolist() == [32, 16, 48, 32]
    assert places.row[~vision].unique().tolist() == [-1]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_pixtral_layout_without_original_sizes_returns_no_boxes(model_type: str) -> None:
    """`image_sizes` of the inputs are those after resizing, so they give no box in pixels of the original."""
    family = tiny(model_type)
    inputs = family(["#"], [[CoordinateImage(80, 48).image]])
    places = TokenMap.from_inputs(family.model(), inputs, family.processor).require_places()
    assert places.box.isnan().all()
    assert places.column.max() > 0


def test_pixtral_layout_with_cropping_processor_returns_no_boxes() -> None:
    family, image = tiny("mistral3"), CoordinateImage(80, 48).image
    inputs, model = family(["#"], [[image]]), family.model()
    family.processor.image_processor.do_center_crop = True
    try:
        places = TokenMap.from_inputs(model, inputs, family.processor, [image]).require_places()
    finally:
        family.processor.image_processor.do_center_crop = None
    assert places.box.isnan().all()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_pixtral_layout_with_mismatched_inputs_raises_value_error(model_type: str) -> None:
    family, image = tiny(model_type), CoordinateImage(48, 24).image
    inputs, model = dict(family(["#"], [[image]])), family.model()
    with pytest.raises(ValueError, match=r"hold 1 images.*2 images or image_sizes"):
        TokenMap.from_inputs(model, inputs, images=[image, image])
    with pytest.raises(ValueError, match=r"images have \d+ visual tokens.*input_ids hold \d+;"):
        TokenMap.from_inputs(model, inputs | {"input_ids": inputs["input_ids"][:, -8:], "attention_mask": None})
    with pytest.raises(ValueError, match="inputs have no image_sizes"):
        TokenMap.from_inputs(model, inputs | {"image_sizes": None})
