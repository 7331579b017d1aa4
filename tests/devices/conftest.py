"""Devices that tests run on, and the small LLaVA and its prompts. `-k cuda` selects the tests of a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from tests.tiny_models import IMAGE_TOKEN, PAD_TOKEN, sharp_text_config, tiny_llava, tiny_vision_config

PATCHES = 64


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("this machine has no CUDA")
    return torch.device(request.param)


@pytest.fixture
def make_llava() -> Callable[..., LlavaForConditionalGeneration]:
    """Factory of a LLaVA with 64 patches and four heads of 16, a width that every attention kernel takes."""

    def make(attention: str = "sdpa") -> LlavaForConditionalGeneration:
        text = sharp_text_config(hidden_size=64, intermediate_size=96, initializer_range=0.15)
        return tiny_llava(attention, text_config=text, vision_config=tiny_vision_config(image_size=32))

    return make


@pytest.fixture
def make_prompt() -> Callable[..., dict[str, Any]]:
    """Factory of one row of an image and 40 text tokens, or of it and two shorter rows padded on the left."""

    def make(padded: bool, device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        lengths = (20, 3, 11) if padded else (20,)  # text tokens after the image
        longest = 20 + PATCHES + lengths[0]
        ids, mask = torch.full((len(lengths), longest), PAD_TOKEN), torch.zeros(len(lengths), longest, dtype=torch.long)
        for row, after in enumerate(lengths):
            text = torch.randint(2, IMAGE_TOKEN, (20 + after,), generator=generator)
            prompt = torch.cat([text[:20], torch.full((PATCHES,), IMAGE_TOKEN), text[20:]])
            ids[row, -len(prompt) :], mask[row, -len(prompt) :] = prompt, 1
        pixels = torch.randn(len(lengths), 3, 32, 32, generator=generator).to(device, dtype)
        return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "pixel_values": pixels}

    return make
