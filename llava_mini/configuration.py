"""Configuration of LLaVA-Mini."""

from __future__ import annotations

from typing import cast

from huggingface_hub.dataclasses import strict
from transformers import LlavaConfig, PreTrainedConfig

from .compressors import COMPRESSORS


@strict
class LlavaMiniConfig(LlavaConfig):
    r"""A [`LlavaConfig`] with the compression and the pre-fusion of LLaVA-Mini (arXiv 2501.03895, section 4).

    The defaults are those of the released checkpoint: one token an image, four pre-fusion layers.

    Args:
        compressor: How patches become visual tokens: a name in `llava_mini.compressors.COMPRESSORS`, or "none" to give
            the language model every patch.
        compressor_size: C; an image becomes C x C visual tokens. Ignored by the compressor "none".
        compressor_heads: Attention heads of the compressor "query"; must divide the width of the vision features.
        prefusion_layers: Decoder layers that fuse the text with the patches ahead of the language model; 0 for none.
        prefusion_init: What new pre-fusion layers start from: "fresh" for the language model's own random
            initialisation, "language_model" for a copy of its first `prefusion_layers` layers.

    Raises:
        ValueError: If a field has a value outside its range.
    """

    model_type = "llava_mini"

    compressor: str = "query"
    compressor_size: int = 1
    compressor_heads: int = 8
    prefusion_layers: int = 4
    prefusion_init: str = "fresh"

    def __post_init__(self, **kwargs):
        # The folder of an ordinary LLaVA says "llava", which would become an attribute and lead transformers astray.
        kwargs.pop("model_type", None)
        super().__post_init__(**kwargs)
        self.check()

    def check(self) -> None:
        """Raises a ValueError if a field is out of range. Apart from `__post_init__` the model calls it too, since
        `from_pretrained(folder, compressor_size=2)` sets fields after the configuration was built."""
        if self.compressor not in ("none", *COMPRESSORS):
            known = ", ".join(sorted(COMPRESSORS))
            raise ValueError(f"compressor must be 'none' or one of {known}; got {self.compressor!r}")
        for name, least in (("compressor_size", 1), ("compressor_heads", 1), ("prefusion_layers", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}; got {value!r}")
        if self.prefusion_init not in ("fresh", "language_model"):
            raise ValueError(f"prefusion_init must be 'fresh' or 'language_model'; got {self.prefusion_init!r}")
        layers = self.get_text_config().num_hidden_layers
        if self.prefusion_init == "language_model" and self.prefusion_layers > layers:
            raise ValueError(
                f"prefusion_init='language_model' copies at most the language model's {layers} layers; "
                f"got prefusion_layers={self.prefusion_layers}"
            )

    @property
    def vision_width(self) -> int:
        """Width of the vision features that the compressor and the projector take in."""
        layers = 1 if isinstance(self.vision_feature_layer, int) else len(self.vision_feature_layer)
        return cast(PreTrainedConfig, self.vision_config).hidden_size * layers

    def num_visual_tokens(self, patches: int) -> int:
        """How many tokens the language model sees of an image that the vision tower cut into `patches` patches."""
        return patches if self.compressor == "none" else self.compressor_size**2


__all__ = ["LlavaMiniConfig"]
