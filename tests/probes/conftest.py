"""Tiny random models, and inputs with difficult layouts: padding on either side, unequal texts, rows without image."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

from tests.tiny_models import IMAGE_TOKEN, PAD_TOKEN, PATCHES, tiny_llama, tiny_llava


@pytest.fixture
def make_llava() -> Callable[..., LlavaForConditionalGeneration]:
    """Factory of a LLaVA whose weights depend only on the seed, so that attention implementations can be compared."""
    return tiny_llava


@pytest.fixture
def make_llama() -> Callable[..., LlamaForCausalLM]:
    """Factory of a plain causal language model whose config names an image token."""
    return tiny_llama


def _rows(texts: list[tuple[int, int, int]], side: str) -> dict[str, torch.Tensor]:
    """Return rows of random tokens, given their (text before, visual tokens, text after), padded on `side`."""
    generator = torch.Generator().manual_seed(1)
    length = max(map(sum, texts))
    input_ids = torch.full((len(texts), length), PAD_TOKEN)
    attention_mask = torch.zeros_like(input_ids)
    for row, (before, visual, after) in enumerate(texts):
        tokens = torch.randint(2, IMAGE_TOKEN, (before + visual + after,), generator=generator)
        tokens[before : before + visual] = IMAGE_TOKEN
        positions = slice(length - len(tokens), None) if side == "left" else slice(0, len(tokens))
        input_ids[row, positions] = tokens
        attention_mask[row, positions] = 1
    images = sum(visual > 0 for _, visual, _ in texts)
    pixel_values = torch.randn(images, 3, 8, 8, generator=generator)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixel_values}


@pytest.fixture
def make_inputs() -> Callable[..., dict[str, torch.Tensor]]:
    """Factory of three rows of unequal text: image in the middle, image at the start, and no image."""

    def make(side: str = "left") -> dict[str, torch.Tensor]:
        return _rows([(3, PATCHES, 6), (0, PATCHES, 4), (0, 0, 7)], side)

    return make


@pytest.fixture
def make_rows() -> Callable[..., dict[str, torch.Tensor]]:
    """Factory of rows from their (text before, visual tokens, text after)."""
    return _rows
