"""Visual layout of Llama 4, and its attention by chunks and without rotary embeddings."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from probes import RemoveTokens, TokenMap, intervene
from probes.hooks.decoder import find_decoder
from probes.hooks.partial_call import can_run_subset
from tests.probes.tokens.families.boxes import CoordinateImage, pixel_colours
from tests.probes.tokens.families.build import TinyFamily, tiny


def check_padded_boxes(family: TinyFamily, rows: dict[str, list[tuple[int, int]]], side: str = "left") -> TokenMap:
    """Check boxes as `check_boxes` does, where black padding covers the part of a box that exceeds its image."""
    sizes = [size for row in rows.values() for size in row]
    images = [CoordinateImage(*size, blue=20 * index + 20).image for index, size in enumerate(sizes)]
    remaining = iter(images)
    inputs = family(list(rows), [[next(remaining) for _ in row] for row in rows.values()], side)
    tokens = TokenMap.from_inputs(family.model(), inputs, family.processor, images)
    places, vision = tokens.require_places(), tokens.mask("vision")
    colours = pixel_colours(family, inputs, tokens)
    first = torch.tensor([len(row) for row in rows.values()]).cumsum(0) - torch.tensor([*map(len, rows.values())])
    index = (places.image + first[:, None])[vision]
    size, box = np.array(sizes)[index], places.box[vision].double().numpy()
    start, stop = box[:, :2].clip(0, size), box[:, 2:].clip(0, size)  # the part inside the image
    share = (stop - start).prod(1, keepdims=True) / (box[:, 2:] - box[:, :2]).prod(1, keepdims=True)
    np.testing.assert_allclose(colours[:, :2] / 255 * size, share * (start + stop) / 2, atol=0.6)
    np.testing.assert_allclose(colours[:, 2:], share * (20 * index.numpy()[:, None] + 20), atol=1)
    return tokens


@pytest.mark.parametrize("side", ["left", "right"])
def test_llama4_layout_boxes_match_pixels(side: str) -> None:
    """Images are of 6, 4, 3 and 2 tiles and of none, enlarged or not, with padding at the right or at the bottom."""
    rows = {
        "a#b": [(48, 32)],
        "#": [(32, 32)],
        "#and#in one row": [(16, 48), (40, 16)],
        "##": [(12, 9), (97, 60)],
    }
    tokens = check_padded_boxes(tiny("llama4"), rows, side)
    places, vision = tokens.require_places(), tokens.mask("vision")
    assert places.tile[0][vision[0]].tolist() == torch.arange(7).repeat_interleave(4).tolist()
    assert places.image.amax(1).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("size", [(16, 16), (100, 30), (30, 100), (17, 50), (33, 34), (200, 21), (5, 60), (61, 40)])
def test_llama4_layout_boxes_of_any_size_match_pixels(size: tuple[int, int]) -> None:
    check_padded_boxes(tiny("llama4"), {"see #": [size]})


def test_llama4_layout_boxes_with_largest_canvas_match_pixels() -> None:
    family = tiny("llama4")
    family.processor.image_processor.resize_to_max_canvas = True
    try:
        check_padded_boxes(family, {"see #": [(20, 9)], "#": [(14, 30)]})
    finally:
        family.processor.image_processor.resize_to_max_canvas = False


def test_llama4_layout_without_processor_returns_boxes_of_whole_images_only() -> None:
    """How far tiles are enlarged is known to the image processor alone."""
    family, image = tiny("llama4"), CoordinateImage(48, 32).image
    inputs, model = family(["#"], [[image]]), family.model()
    tokens = TokenMap.from_inputs(model, inputs, images=[image])
    places, vision = tokens.require_places(), tokens.mask("vision")
    assert places.box[vision].isnan().all(-1).tolist() == [True] * 24 + [False] * 4
    assert places.tile[vision].tolist() == torch.arange(7).repeat_interleave(4).tolist()
    assert TokenMap.from_inputs(model, inputs, family.processor).require_places().box.isnan().all()


def test_llama4_layout_with_mismatched_inputs_raises_value_error() -> None:
    family, image = tiny("llama4"), CoordinateImage(48, 32).image
    inputs, model = dict(family(["#"], [[image]])), family.model()
    with pytest.raises(ValueError, match=r"hold 1 images.*2 images or image_sizes"):
        TokenMap.from_inputs(model, inputs, images=[image, image])
    separator = family.processor.tokenizer.convert_tokens_to_ids("<|tile_x_separator|>")
    ids = inputs["input_ids"].clone()
    ids[0, (ids[0] == separator).nonzero()[0]] = family.processor.tokenizer.convert_tokens_to_ids(
        "<|tile_y_separator|>"
    )
    with pytest.raises(ValueError, match=r"rows of tiles have unequal lengths: .*\[1, 3, 6\] of 6"):
        TokenMap.from_inputs(model, inputs | {"input_ids": ids})


def test_remove_tokens_by_drop_where_queries_scale_by_index_raises() -> None:
    """From `floor_scale` on, layers without rotary embeddings scale queries by their index in the call."""
    family = tiny("llama4")
    inputs, model = family(["#"], [[CoordinateImage(48, 32).image]]), family.model()
    tokens, decoder = TokenMap.from_inputs(model, inputs), find_decoder(model)
    length = tokens.labels.shape[1]
    attention = decoder.layers[1].self_attn
    attention.floor_scale = length + 1
    assert can_run_subset(decoder, length)
    attention.floor_scale = length
    with pytest.raises(ValueError, match="Llama4TextModel cannot run its layers on some tokens only: use how='mask'"):
        intervene(model, tokens, RemoveTokens("vision", [1], how="drop")).__enter__()
