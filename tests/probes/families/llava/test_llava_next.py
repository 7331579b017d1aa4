from __future__ import annotations

from typing import Any

import pytest
import torch

from probes.tokens import TokenMap

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
