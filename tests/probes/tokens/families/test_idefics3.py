"""Visual layout of Idefics3 and SmolVLM."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probes import TokenMap
from tests.probes.tokens.families.boxes import CoordinateImage, check_boxes, check_centres, make_video, pixel_colours
from tests.probes.tokens.families.build import tiny

MODEL_TYPES = ["idefics3", "smolvlm"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", MODEL_TYPES)
def test_idefics3_layout_boxes_match_pixels(family: str, side: str) -> None:
    rows = {"a#b": [(97, 60)], "##": [(40, 133), (200, 16)]}
    tokens = check_boxes(tiny(family), rows, side)
    assert tokens.require_places().image.amax(1).tolist() == [0, 1]


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_idefics3_layout_of_unsplit_image_returns_one_tile(family: str) -> None:
    tokens = check_boxes(tiny(family), {"a##b": [(97, 60), (20, 20)]}, do_image_splitting=False)
    places, vision = tokens.require_places(), tokens.mask("vision")
    assert places.image[vision].tolist() == [0] * 4 + [1] * 4
    assert places.tile[vision].unique().tolist() == [0]


@settings(max_examples=15)
@given(width=st.integers(8, 240), height=st.integers(8, 240))
def test_idefics3_layout_returns_tiles_of_image_processor(width: int, height: int) -> None:
    """Rows and columns of tiles equal those that the image processor reports, for any image size."""
    family, image = tiny("idefics3"), CoordinateImage(width, height).image
    processed = family.processor.image_processor([[image]], return_row_col_info=True, return_tensors="pt")
    rows, columns = processed["rows"][0][0], processed["cols"][0][0]
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


def test_idefics3_layout_of_smolvlm_videos_returns_frames() -> None:
    """Row 0 has two videos, row 1 has one."""
    family, sizes = tiny("smolvlm"), [(40, 24), (24, 50), (30, 30)]
    videos = [make_video(*size, 3, blue=70 * number) for number, size in enumerate(sizes)]
    inputs = family(["a <video> b <video>", "<video>"], [], videos=videos)
    model = family.model()
    tokens = TokenMap.from_inputs(model, inputs, family.processor, videos)
    places, vision = tokens.require_places(), tokens.mask("vision")
    assert places.image[vision].tolist() == [0] * 12 + [1] * 12 + [0] * 12
    assert places.frame[vision].tolist() == 3 * torch.arange(3).repeat_interleave(4).tolist()
    assert places.tile[vision].unique().tolist() == [0]

    colours, video = pixel_colours(family, inputs, tokens), torch.arange(3).repeat_interleave(12)
    np.testing.assert_allclose(colours[:, 2], 70 * video + 20 * places.frame[vision], atol=0.1)
    check_centres(colours, tokens, np.array(sizes)[video])
    without_processor = TokenMap.from_inputs(model, inputs).require_places()
    assert without_processor.image.amax(1).tolist() == [5, 2], "without the processor each frame counts as an image"


def test_idefics3_layout_with_mismatched_inputs_raises_value_error() -> None:
    family, image = tiny("idefics3"), CoordinateImage(64, 40).image
    inputs, model = dict(family(["#"], [[image]])), family.model()
    inputs["attention_mask"] = None
    ids = inputs["input_ids"]
    with pytest.raises(ValueError, match=r"hold 1 images.*2 images or image_sizes"):
        TokenMap.from_inputs(model, inputs, images=[image, image])
    with pytest.raises(ValueError, match="lack the two marker tokens before each tile"):
        TokenMap.from_inputs(
            model, inputs | {"input_ids": ids[:, ids[0].tolist().index(model.config.image_token_id) :]}
        )
    changed = ids.clone()
    changed[changed == family.processor.fake_image_token_id] = torch.arange(
        int((ids == family.processor.fake_image_token_id).sum())
    )
    with pytest.raises(ValueError, match="lack the two marker tokens before each tile"):
        TokenMap.from_inputs(model, inputs | {"input_ids": changed})
    newline = ids[0].tolist().index(family.processor.tokenizer("\n")["input_ids"][0])
    with pytest.raises(ValueError, match="rows of tiles have unequal lengths"):
        TokenMap.from_inputs(model, inputs | {"input_ids": torch.cat([ids[:, :newline], ids[:, newline + 1 :]], 1)})
