"""LLaVA-Mini (arXiv 2501.03895) as a transformers model. Importing this package registers it with the Auto classes."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from .configuration import PRESETS, LlavaMiniConfig
from .encoded_images import Pictures
from .modeling import LlavaMiniForConditionalGeneration, LlavaMiniModel
from .pretrained_model import LlavaMiniPreTrainedModel
from .processing import LlavaMiniProcessor

AutoConfig.register("llava_mini", LlavaMiniConfig)
AutoModel.register(LlavaMiniConfig, LlavaMiniModel)
AutoModelForImageTextToText.register(LlavaMiniConfig, LlavaMiniForConditionalGeneration)
AutoProcessor.register(LlavaMiniConfig, LlavaMiniProcessor)

# LLaVA checkpoints on disk use other weight names than the classes. Without these tables, loading an ordinary LLaVA
# checkpoint would miss the language model and leave its weights random.
register_checkpoint_conversion_mapping("llava_mini", get_checkpoint_conversion_mapping("llava"))
register_checkpoint_conversion_mapping("LlavaMiniModel", get_checkpoint_conversion_mapping("LlavaModel"))


def __getattr__(name: str) -> Any:
    if name == "convert_official":  # imported lazily: `python -m llava_mini.convert` must not import it twice
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
