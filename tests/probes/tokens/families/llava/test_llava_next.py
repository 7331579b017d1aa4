from __future__ import annotations

from typing import Any

import pytest
import torch

from probes.tokens.token_map import TokenMap

SIZES = [(24, 24), (48, 48), (40, 100), (100, 40), (9, 13), (300, 211), (24, 200), (333, 61), (47, 50), (31, 33)]
PROMPT = "user : <image> what is this"


@pytest.mark.parametrize("given", ["processor", "inputs alone"])
def test_boxes(make_llava_next: Any, map_picture: Any, colours_of: Any, check_boxes: Any, given: str) -> None:
    """All sizes in one batch: every tile grid, upright and across, with padding that is cut off at either side."""
    model, processor = make_llava_next()
    pictures = [map_picture(*size) for size in SIZES]
    inputs = processor(images=pictures, text=[PROMPT] * len(SIZES), padding=True, return_tensors="pt")
    tokens = TokenMap.from_inputs(model, inputs, processor if given == "processor" else None)
    places = tokens.require_places()
    assert torch.equal(places.image >= 0, tokens.mask("vision"))
    sizes = torch.tensor(SIZES)[tokens.mask("vision").nonzero()[:, 0]]
    check_boxes(colours_of(model, inputs), places, sizes)


def test_tiles_and_newlines_by_hand(make_llava_next: Any, map_picture: Any) -> None:
    """25 x 100 goes to 24 x 72 pixels, three tiles side by side, of which the middle 18 pixels in height are the picture:
    of 4 rows of patches 3 would do, but as many rows would have to be cut off at either side."""
    model, processor = make_llava_next()
    inputs = processor(images=map_picture(25, 100), text=PROMPT, return_tensors="pt")
    tokens = TokenMap.from_inputs(model, inputs)
    places, visual = tokens.require_places(), tokens.mask("vision")
    tile, row, column = (getattr(places, name)[visual].tolist() for name in ("tile", "row", "column"))
    assert tile == [0] * 16 + ([1] * 4 + [2] * 4 + [3] * 5) * 4, "a newline is of the last tile of its row"
    assert row == [i // 4 for i in range(16)] + [i // 13 for i in range(52)]
    assert column == [i % 4 for i in range(16)] + [*range(12), -1] * 4
    box = places.box[visual]
    assert box[:16:5].tolist() == [[25 * i, 6.25 * i, 25 * i + 25, 6.25 * i + 6.25] for i in range(4)]
    # The picture's 25 pixels are 18 of the 24, with three above them; a patch is 6.
    torch.testing.assert_close(box[16], torch.tensor([0, -25 / 6, 100 / 12, 25 / 6]))
    assert tokens.split("vision", by="tile").groups[2:6] == ("vision_0", "vision_1", "vision_2", "vision_3")


def test_several_pictures_a_row(make_llava_next: Any, map_picture: Any, colours_of: Any, check_boxes: Any) -> None:
    model, processor = make_llava_next()
    pictures = [[map_picture(40, 100), map_picture(60, 30)], [map_picture(24, 24)]]
    texts = ["user : <image> what <image>", PROMPT]
    inputs = processor(images=pictures, text=texts, padding=True, padding_side="left", return_tensors="pt")
    tokens = TokenMap.from_inputs(model, inputs, processor, pictures)
    places, visual = tokens.require_places(), tokens.mask("vision")
    known = torch.tensor([[(40, 100), (60, 30)], [(24, 24), (0, 0)]])
    check_boxes(colours_of(model, inputs), places, known[visual.nonzero()[:, 0], places.image[visual]])


def test_a_processor_that_crops_tiles_leaves_no_boxes(make_llava_next: Any, map_picture: Any) -> None:
    model, processor = make_llava_next(size={"shortest_edge": 30})
    inputs = processor(images=map_picture(40, 100), text=PROMPT, return_tensors="pt")
    assert TokenMap.from_inputs(model, inputs, processor).require_places().box.isnan().all()


def test_the_model_takes_the_inputs(make_llava_next: Any, map_picture: Any) -> None:
    model, processor = make_llava_next()
    inputs = processor(images=map_picture(40, 100), text=PROMPT, return_tensors="pt")
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()
