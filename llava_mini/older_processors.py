"""Fields that processors lack which older versions of transformers saved: they are read from the model's configuration."""

from __future__ import annotations

from typing import Any, cast

from transformers import AutoConfig, LlavaConfig, LlavaProcessor, PreTrainedConfig

# Vision towers whose output starts with one class token.
CLASS_TOKEN_MODEL_TYPES = ("clip_vision_model", "dinov2", "vit")
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def is_complete(processor: LlavaProcessor) -> bool:
    """Return whether a processor has all fields that counting an image's placeholders needs.

    0 additional tokens is the default of transformers. It is also what a processor has whose file lacks the number.
    """
    fields: Any = processor
    return bool(fields.patch_size and fields.vision_feature_select_strategy and fields.num_additional_image_tokens)


def complete_from_config(processor: LlavaProcessor, config: LlavaConfig) -> None:
    """Set those of the fields that the processor lacks.

    Args:
        processor: The processor to change.
        config: Configuration of its model.
    """
    fields: Any = processor
    vision = cast(PreTrainedConfig, config.vision_config)
    fields.patch_size = fields.patch_size or vision.patch_size
    fields.vision_feature_select_strategy = (
        fields.vision_feature_select_strategy or config.vision_feature_select_strategy
    )
    if not fields.num_additional_image_tokens and vision.model_type in CLASS_TOKEN_MODEL_TYPES:
        fields.num_additional_image_tokens = 1


def complete_from_checkpoint(processor: LlavaProcessor, name: Any, arguments: dict[str, Any]) -> None:
    """Set those of the fields that the processor lacks, from the config.json beside it if there is one.

    Args:
        processor: The processor to change.
        name: The folder or hub name that it was loaded from.
        arguments: Arguments of its `from_pretrained`.
    """
    if is_complete(processor):
        return
    try:
        config = AutoConfig.from_pretrained(name, **{key: arguments[key] for key in HUB_ARGUMENTS if key in arguments})
    except (OSError, ValueError):  # a processor without its model; it raises once it needs a field that it lacks
        return
    if isinstance(config, LlavaConfig):
        complete_from_config(processor, config)


__all__ = ["complete_from_checkpoint", "complete_from_config", "is_complete"]
