"""LLaVA-Mini (arXiv 2501.03895) as a transformers model; importing it registers it with the Auto classes."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from .configuration import PRESETS, LlavaMiniConfig
from .encoded_images import Pictures
from .modeling import LlavaMiniForConditionalGeneration, LlavaMiniModel, LlavaMiniPreTrainedModel
from .processing import LlavaMiniProcessor

AutoConfig.register("llava_mini", LlavaMiniConfig)
AutoModel.register(LlavaMiniConfig, LlavaMiniModel)
AutoModelForImageTextToText.register(LlavaMiniConfig, LlavaMiniForConditionalGeneration)
AutoProcessor.register(LlavaMiniConfig, LlavaMiniProcessor)

# LLaVA checkpoints on disk name their weights otherwise than the classes do. Without these tables the language model
# of an ordinary LLaVA checkpoint would not be found, and be left at random.
register_checkpoint_conversion_mapping("llava_mini", get_checkpoint_conversion_mapping("llava"))
register_checkpoint_conversion_mapping("LlavaMiniModel", get_checkpoint_conversion_mapping("LlavaModel"))


def __getattr__(name: str) -> Any:
    if name == "convert_official":  # imported when asked for: it is also a program, `python -m llava_mini.convert`
        from .convert import convert_official

        return convert_official
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "PRESETS",
    "LlavaMiniConfig",
    "LlavaMiniForConditionalGeneration",
    "LlavaMiniModel",
    "LlavaMiniPreTrainedModel",
    "LlavaMiniProcessor",
    "Pictures",
    "convert_official",
]
