"""Tiny configurations, and models with random weights, that tests share.

A test passes what differs as overrides, so that its configuration shows only what matters to it.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

IMAGE_TOKEN, PAD_TOKEN, PATCHES, LAYERS = 63, 0, 4, 3


def tiny_text_config(config_class: Any = LlamaConfig, **overrides: Any) -> Any:
    """Return the configuration of a language model with 3 layers of width 32 and a vocabulary of 64.

    Args:
        config_class: Configuration class of the language model.
        overrides: Fields that differ. Other fields than sizes keep the defaults of the class.
    """
    sizes = {
        "vocab_size": IMAGE_TOKEN + 1,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return config_class(**sizes | overrides)


def sharp_text_config(config_class: Any = LlamaConfig, **overrides: Any) -> Any:
    """Return a tiny language model's configuration with sharp attention, padding, and no end token.

    The weights have ten times the usual scale, so that attention is far from uniform.

    Args:
        config_class: Configuration class of the language model.
        overrides: Fields that differ.
    """
    fields = {"pad_token_id": PAD_TOKEN, "bos_token_id": 1, "eos_token_id": None, "initializer_range": 0.2}
    return tiny_text_config(config_class, **fields | overrides)


def tiny_vision_config(config_class: Any = CLIPVisionConfig, **overrides: Any) -> Any:
    """Return the configuration of a vision tower with 2 layers of width 32 and 2 x 2 patches.

    Args:
        config_class: Configuration class of the vision tower.
        overrides: Fields that differ.
    """
    fields = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    if config_class is Dinov2Config:  # has `mlp_ratio` instead
        del fields["intermediate_size"]
    return config_class(**fields | overrides)


def tiny_llava_config(config_class: Any = LlavaConfig, **overrides: Any) -> Any:
    """Return the configuration of a LLaVA with a tiny CLIP and a tiny Llama with sharp attention.

    Args:
        config_class: Configuration class of the model, LLaVA's or that of a model derived from it.
        overrides: Fields that differ, for example `text_config` and `vision_config`.
    """
    fields = {"image_token_id": IMAGE_TOKEN} | overrides
    fields.setdefault("text_config", sharp_text_config())
    fields.setdefault("vision_config", tiny_vision_config())
    return config_class(**fields)


def tiny_llava(attention: str = "sdpa", seed: int = 0, **overrides: Any) -> LlavaForConditionalGeneration:
    """Return a tiny LLaVA in evaluation mode.

    The weights depend only on the seed and the sizes, so that attention implementations can be compared.

    Args:
        attention: Attention implementation of all parts.
        seed: Seed of the weights.
        overrides: Fields of `tiny_llava_config` that differ.
    """
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(tiny_llava_config(**overrides)).eval()
    model.set_attn_implementation(attention)
    return model


def tiny_llama(attention: str = "sdpa", seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """Return a tiny Llama with sharp attention, in evaluation mode, whose configuration names an image token.

    Args:
        attention: Attention implementation.
        seed: Seed of the weights.
        overrides: Fields of `sharp_text_config` that differ.
    """
    torch.manual_seed(seed)
    model = LlamaForCausalLM(sharp_text_config(**{"image_token_id": IMAGE_TOKEN} | overrides)).eval()
    model.set_attn_implementation(attention)
    return model
