from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probes import TokenMap
from tests.probes.tokens.families.boxes import Picture, check_boxes, check_centres, film, seen
from tests.probes.tokens.families.build import tiny

FAMILIES = ["idefics3", "smolvlm"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_boxes_are_the_pixels_of_the_tokens(family: str, side: str) -> None:
    rows = {"a#b": [(97, 60)], "##": [(40, 133), (200, 16)]}
    tokens = check_boxes(tiny(family), rows, side)
    assert tokens.require_places().image.amax(1).tolist() == [0, 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_picture_that_is_not_split_is_one_tile(family: str) -> None:
    tokens = check_boxes(tiny(family), {"a##b": [(97, 60), (20, 20)]}, do_image_splitting=False)
    places, vision = tokens.require_places(), tokens.mask("vision")
    assert places.image[vision].tolist() == [0] * 4 + [1] * 4
    assert places.tile[vision].unique().tolist() == [0]


@settings(max_examples=15)
@given(width=st.integers(8, 240), height=st.integers(8, 240))
def test_tiles_are_those_of_the_image_processor(width: int, height: int) -> None:
    """As many rows and columns as it counts itself, for any shape."""
    family, image = tiny("idefics3"), Picture(width, height).image
    made = family.processor.image_processor([[image]], return_row_col_info=True, return_tensors="pt")
    rows, columns = made["rows"][0][0], made["cols"][0][0]
    tokens = TokenMap.from_inputs(family.model(), family(["#"], [[image]]), images=[image])

    places, vision = tokens.require_places(), tokens.mask("vision")
    assert places.tile[vision].tolist() == torch.arange(rows * columns + 1).repeat_interleave(4).tolist()
    boxes = places.box[vision].unflatten(0, (-1, 4))
    tiles = torch.cat([boxes[:, 0, :2], boxes[:, -1, 2:]], 1)
    across, down = width / max(columns, 1), height / max(rows, 1)
    expected = [
        [column * across, row * down, (column + 1) * across, (row + 1) * down]
        for row in range(rows)
        for column in range(columns)
    ]
    torch.testing.assert_close(tiles, torch.tensor([*expected, [0, 0, width, height]]).float())


def test_frames_of_smolvlm_videos() -> None:
    """Two videos in one row, one in the next."""
    family, sizes = tiny("smolvlm"), [(40, 24), (24, 50), (30, 30)]
    videos = [film(*size, 3, blue=70 * number) for number, size in enumerate(sizes)]
    inputs = family(["a <video> b <video>", "<video>"], [], videos=videos)
    model = family.model()
    tokens = TokenMap.from_inputs(model, inputs, family.processor, videos)
    places, vision = tokens.require_places(), tokens.mask("vision")
    assert places.image[vision].tolist() == [0] * 12 + [1] * 12 + [0] * 12
    assert places.frame[vision].tolist() == 3 * torch.arange(3).repeat_interleave(4).tolist()
    assert places.tile[vision].unique().tolist() == [0]

    colours, picture = seen(family, inputs, tokens), torch.arange(3).repeat_interleave(12)
    np.testing.assert_allclose(colours[:, 2], 70 * picture + 20 * places.frame[vision], atol=0.1)
    check_centres(colours, tokens, np.array(sizes)[picture])
    alone = TokenMap.from_inputs(model, inputs).require_places()
    assert alone.image.amax(1).tolist() == [5, 2], "without the processor each frame is a picture"


def test_inputs_that_do_not_fit() -> None:
    family, image = tiny("idefics3"), Picture(64, 40).image
    inputs, model = dict(family(["#"], [[image]])), family.model()
    inputs["attention_mask"] = None
    ids = inputs["input_ids"]
    with pytest.raises(ValueError, match="the inputs hold 1 pictures, but 2 images or image_sizes are given"):
        TokenMap.from_inputs(model, inputs, images=[image, image])
    with pytest.raises(ValueError, match="without the two marks before each tile"):
        TokenMap.from_inputs(
            model, inputs | {"input_ids": ids[:, ids[0].tolist().index(model.config.image_token_id) :]}
        )
    other = ids.clone()
    other[other == family.processor.fake_image_token_id] = torch.arange(
        int((ids == family.processor.fake_image_token_id).sum())
    )
    with pytest.raises(ValueError, match="without the two marks before each tile"):
        TokenMap.from_inputs(model, inputs | {"input_ids": other})
    newline = ids[0].tolist().index(family.processor.tokenizer("\n")["input_ids"][0])
    with pytest.raises(ValueError, match="rows of unequal numbers of tiles"):
        TokenMap.from_inputs(model, inputs | {"input_ids": torch.cat([ids[:, :newline], ids[:, newline + 1 :]], 1)})
