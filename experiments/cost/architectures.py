"""Configurations of the models whose cost can be estimated by name; they hold sizes only, so nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoConfig, CLIPVisionConfig, Dinov2Config, LlamaConfig, LlavaConfig

from experiments.files import ASSETS
from llava_mini import LlavaMiniConfig
from llava_mini.official_config import CLIP_L_336

# lmsys/vicuna-7b-v1.5 and -13b-v1.5, with LLaVA's placeholder and padding tokens in the vocabulary
VICUNA_7B = {"vocab_size": 32064, "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 4096}
VICUNA_13B = VICUNA_7B | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
}
# meta-llama/Llama-3.1-8B-Instruct
LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
# HuggingFaceTB/SmolLM2-135M-Instruct
SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
# facebook/dinov2-small at 224 pixels
DINOV2_SMALL = {"hidden_size": 384, "num_attention_heads": 6, "image_size": 224, "patch_size": 14}

ARCHITECTURES: dict[str, Callable[[], LlavaConfig]] = {
    "tiny": lambda: AutoConfig.from_pretrained(ASSETS / "tiny"),
    "smol": lambda: _llava(Dinov2Config(**DINOV2_SMALL), SMOLLM2),
    "llava-1.5-7b": lambda: _llava(CLIPVisionConfig(**CLIP_L_336), VICUNA_7B),
    "llava-1.5-13b": lambda: _llava(CLIPVisionConfig(**CLIP_L_336), VICUNA_13B),
    "llama-3.1-8b": lambda: _llava(CLIPVisionConfig(**CLIP_L_336), LLAMA_8B),
}


def llava_config(name: str, *, setting: str = "model") -> LlavaConfig:
    """Return the configuration of a LLaVA or a LLaVA-Mini.

    Args:
        name: A key of `ARCHITECTURES`, or the folder of a saved model.
        setting: The setting that gives the name, for errors.

    Raises:
        ValueError: If the name is neither, or the folder holds another kind of model.

    Example:
        >>> llava_config("llava-1.5-7b").get_text_config().num_hidden_layers
        32
    """
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]()
    if not (Path(name) / "config.json").is_file():
        raise ValueError(
            f"{setting}: no architecture {name!r}; use {', '.join(ARCHITECTURES)}, or a folder with a config.json"
        )
    config = AutoConfig.from_pretrained(name)
    if not isinstance(config, LlavaConfig):
        raise ValueError(
            f"{setting}: {name} holds a {config.model_type}; costs can be estimated for LLaVA and LLaVA-Mini only"
        )
    return config


def llava_mini_config(config: LlavaConfig, **fields: Any) -> LlavaMiniConfig:
    """Return the configuration of a LLaVA-Mini on the parts of a LLaVA.

    Args:
        config: The configuration of the LLaVA.
        fields: Fields of `LlavaMiniConfig`.
    """
    return LlavaMiniConfig(**(config.to_dict() | fields))


def _llava(vision: Any, text: dict[str, Any]) -> LlavaConfig:
    return LlavaConfig(vision_config=vision, text_config=LlamaConfig(**text))
