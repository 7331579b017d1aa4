"""Visual layout of LLaVA-NeXT."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from probes.tokens.token_map import TokenMap

SIZES = [(24, 24), (48, 48), (40, 100), (100, 40), (9, 13), (300, 211), (24, 200), (333, 61), (47, 50), (31, 33)]
PROMPT = "user : <image> what is this"


@pytest.mark.parametrize("source", ["processor", "inputs only"])
def test_llava_next_layout_boxes_match_colours(
    make_llava_next: Any, coordinate_image: Any, token_colours: Any, check_boxes: Any, source: str
) -> None:
    """One batch has all sizes: every tile grid, portrait and landscape, with padding removed at either side."""
    model, processor = make_llava_next()
    images = [coordinate_image(*size) for size in SIZES]
    inputs = processor(images=images, text=[PROMPT] * len(SIZES), padding=True, return_tensors="pt")
    tokens = TokenMap.from_inputs(model, inputs, processor if source == "processor" else None)
    places = tokens.require_places()
    assert torch.equal(places.image >= 0, tokens.mask("vision"))
    sizes = torch.tensor(SIZES)[tokens.mask("vision").nonzero()[:, 0]]
    check_boxes(token_colours(model, inputs), places, sizes)


def test_llava_next_layout_of_wide_image_returns_tiles_and_newlines(
    make_llava_next: Any, coordinate_image: Any
) -> None:
    """25 x 100 becomes 24 x 72 pixels, three tiles side by side, whose middle 18 pixels in height show the image.

    3 of the 4 patch rows would cover it, but unpadding removes equally many rows at either side.
    """
    model, processor = make_llava_next()
    inputs = processor(images=coordinate_image(25, 100), text=PROMPT, return_tensors="pt")
    tokens = TokenMap.from_inputs(model, inputs)
    places, visual = tokens.require_places(), tokens.mask("vision")
    tile, row, column = (getattr(places, name)[visual].tolist() for name in ("tile", "row", "column"))
    assert tile == [0] * 16 + ([1] * 4 + [2] * 4 + [3] * 5) * 4, "a newline belongs to the last tile of its row"
    assert row == [i // 4 for i in range(16)] + [i // 13 for i in range(52)]
    assert column == [i % 4 for i in range(16)] + [*range(12), -1] * 4
    box = places.box[visual]
    assert box[:16:5].tolist() == [[25 * i, 6.25 * i, 25 * i + 25, 6.25 * i + 6.25] for i in range(4)]
    # The image's 25 pixels fill 18 of the 24, below 3 of padding; a patch has 6.
    torch.testing.assert_close(box[16], torch.tensor([0, -25 / 6, 100 / 12, 25 / 6]))
    assert tokens.split("vision", by="tile").groups[2:6] == ("vision_0", "vision_1", "vision_2", "vision_3")


def test_llava_next_layout_of_several_images_per_row_boxes_match_colours(
    make_llava_next: Any, coordinate_image: Any, token_colours: Any, check_boxes: Any
) -> None:
    model, processor = make_llava_next()
    images = [[coordinate_image(40, 100), coordinate_image(60, 30)], [coordinate_image(24, 24)]]
    texts = ["user : <image> what <image>", PROMPT]
    inputs = processor(images=images, text=texts, padding=True, padding_side="left", return_tensors="pt")
    tokens = TokenMap.from_inputs(model, inputs, processor, images)
    places, visual = tokens.require_places(), tokens.mask("vision")
    sizes = torch.tensor([[(40, 100), (60, 30)], [(24, 24), (0, 0)]])
    check_boxes(token_colours(model, inputs), places, sizes[visual.nonzero()[:, 0], places.image[visual]])


def test_llava_next_layout_with_cropping_processor_returns_no_boxes(
    make_llava_next: Any, coordinate_image: Any
) -> None:
    model, processor = make_llava_next(size={"shortest_edge": 30})
    inputs = processor(images=coordinate_image(40, 100), text=PROMPT, return_tensors="pt")
    assert TokenMap.from_inputs(model, inputs, processor).require_places().box.isnan().all()


def test_llava_next_with_processor_inputs_returns_finite_logits(make_llava_next: Any, coordinate_image: Any) -> None:
    model, processor = make_llava_next()
    inputs = processor(images=coordinate_image(40, 100), text=PROMPT, return_tensors="pt")
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()
