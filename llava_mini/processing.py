"""Processor of LLaVA-Mini."""

from __future__ import annotations

from typing import Any

from transformers import LlavaProcessor
from transformers.processing_utils import MultiModalData

from .configuration import LlavaMiniConfig


class LlavaMiniProcessor(LlavaProcessor):
    """A [`LlavaProcessor`] that expands `<image>` to the visual tokens that the language model will see.

    Args:
        num_visual_tokens: Placeholders an image takes: C x C, or None for one a patch, as in LLaVA. The other
            arguments are those of [`LlavaProcessor`].
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        patch_size=None,
        vision_feature_select_strategy=None,
        chat_template=None,
        image_token="<image>",
        num_additional_image_tokens=0,
        num_visual_tokens: int | None = None,
        **kwargs: Any,
    ):
        self.num_visual_tokens = num_visual_tokens
        super().__init__(
            image_processor=image_processor,
            tokenizer=tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
            **kwargs,
        )

    @classmethod
    def from_llava(cls, processor: LlavaProcessor, config: LlavaMiniConfig) -> LlavaMiniProcessor:
        """A processor for a LLaVA-Mini of this configuration, on a LLaVA's tokenizer and image processor."""
        return cls(
            image_processor=processor.image_processor,
            tokenizer=processor.tokenizer,
            patch_size=processor.patch_size,
            vision_feature_select_strategy=processor.vision_feature_select_strategy,
            chat_template=processor.chat_template,
            image_token=processor.image_token,
            num_additional_image_tokens=processor.num_additional_image_tokens,
            num_visual_tokens=None if config.compressor == "none" else config.compressor_size**2,
        )

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        if self.num_visual_tokens is None:
            return super().replace_image_token(image_inputs, image_idx, **kwargs)
        return self.image_token * self.num_visual_tokens

    def _get_num_multimodal_tokens(self, image_sizes: list[list[int]] | None = None, **kwargs: Any) -> MultiModalData:
        data = super()._get_num_multimodal_tokens(image_sizes, **kwargs)
        if self.num_visual_tokens is not None and image_sizes is not None:
            data.num_image_tokens = [self.num_visual_tokens] * len(image_sizes)
        return data


__all__ = ["LlavaMiniProcessor"]
