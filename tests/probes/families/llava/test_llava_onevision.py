from __future__ import annotations

from typing import Any

import pytest
import torch

from probes.tokens import TokenMap

SIZES = [(32, 32), (64, 64), (40, 100), (100, 40), (9, 13), (300, 211), (24, 200), (333, 61), (97, 99)]
PROMPT = "user : <image> what is this"


@pytest.mark.parametrize("tiles", [9, 2])
def test_boxes(make_llava_onevision: Any, map_picture: Any, colours_of: Any, check_boxes: Any, tiles: int) -> None:
    """All sizes in one batch, with as many tiles as they need and interpolated to those of two tiles."""
    model, processor = make_llava_onevision(tiles)
    pictures = [map_picture(*size) for size in SIZES]
    inputs = processor(images=pictures, text=[PROMPT] * len(SIZES), padding=True, return_tensors="pt")
    tokens = TokenMap.from_inputs(model, inputs, processor)
    places = tokens.require_places()
    assert torch.equal(places.image >= 0, tokens.mask("vision"))
    sizes = torch.tensor(SIZES)[tokens.mask("vision").nonzero()[:, 0]]
    check_boxes(colours_of(model, inputs), places, sizes)
