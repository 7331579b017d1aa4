"""Tiny random models, and inputs with difficult layouts: padding on either side, unequal texts, rows without image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

IMAGE_TOKEN, PAD_TOKEN, PATCHES, LAYERS = 63, 0, 4, 3


def text_config(**overrides: Any) -> LlamaConfig:
    return LlamaConfig(
        **{
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "pad_token_id": PAD_TOKEN,
            "bos_token_id": 1,
            "eos_token_id": None,
            # Ten times the usual scale, so that attention is far from uniform.
            "initializer_range": 0.2,
        }
        | overrides
    )


@pytest.fixture
def make_llava() -> Callable[..., LlavaForConditionalGeneration]:
    """Factory of a LLaVA whose weights depend only on the seed, so that attention implementations can be compared."""

    def make(implementation: str = "sdpa", seed: int = 0) -> LlavaForConditionalGeneration:
        torch.manual_seed(seed)
        vision = CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
            projection_dim=32,
        )
        config = LlavaConfig(vision_config=vision, text_config=text_config(), image_token_id=IMAGE_TOKEN)
        model = LlavaForConditionalGeneration(config).eval()
        model.set_attn_implementation(implementation)
        return model

    return make


@pytest.fixture
def make_llama() -> Callable[..., LlamaForCausalLM]:
    """Factory of a plain causal language model whose config names an image token."""

    def make(implementation: str = "sdpa", seed: int = 0) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        model = LlamaForCausalLM(text_config(image_token_id=IMAGE_TOKEN)).eval()
        model.set_attn_implementation(implementation)
        return model

    return make


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
