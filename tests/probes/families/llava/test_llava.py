from __future__ import annotations

from typing import Any

import pytest
import torch

from probes.tokens import TokenMap

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
