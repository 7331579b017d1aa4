"""LLaVA's kin, in tiles, through both back ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.probes.families.test_backends import agree


@pytest.mark.parametrize("backend", ["nnsight", "transformer_lens"])
@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision"])
def test_agreement(request: pytest.FixtureRequest, map_picture: Any, family: str, backend: str) -> None:
    model, processor = request.getfixturevalue(f"make_{family}")()
    # Scaled up, for attention that is far from uniform.
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    pictures = [map_picture(40, 100), map_picture(24, 24)]
    text = ["user : <image> what is this", "user : <image> what"]
    agree(model.eval(), dict(processor(images=pictures, text=text, padding=True, return_tensors="pt")), backend)
