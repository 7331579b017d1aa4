"""Configuration of LLaVA-Mini."""

from __future__ import annotations

from typing import Any, cast

from huggingface_hub.dataclasses import strict
from transformers import LlavaConfig, PreTrainedConfig

from .compressors import COMPRESSORS

# What the released code computes, and what the paper writes where the two differ. The published numbers belong to "code".
PRESETS: dict[str, dict[str, Any]] = {
    "code": {
        "compress_before_projection": True,
        "compressor_attention": "multi_head",
        "compressor_positions": "query_grid",
        "prefuse_visual_tokens": True,
    },
    "paper": {
        "compress_before_projection": False,
        "compressor_attention": "bare",
        "compressor_positions": "own_grid",
        "prefuse_visual_tokens": False,
    },
}
CHOICES = {
    "compressor_attention": ("multi_head", "bare"),
    "compressor_positions": ("query_grid", "own_grid"),
}
# Starts of pre-fusion that take the language model's own first layers.
COPIES = ("language_model", "identity")


@strict
class LlavaMiniConfig(LlavaConfig):
    r"""A [`LlavaConfig`] with the compression and the pre-fusion of LLaVA-Mini (arXiv 2501.03895, section 4).

    The defaults are those of the released checkpoint: one token an image, four pre-fusion layers, and the order of the
    released code (ictnlp/LLaVA-Mini, commit 47da113). `LlavaMiniConfig(**PRESETS["paper"])` follows the equations.

    Args:
        compressor: How patches become visual tokens: a name in `llava_mini.compressors.COMPRESSORS`, or "none" to give
            the language model every patch.
        compressor_size: C; an image or a frame becomes C x C visual tokens. 0 leaves pre-fusion alone to carry the
            picture. Ignored by the compressor "none".
        compressor_heads: Attention heads of the compressors that attend ("query", "nested_query", "qformer",
            "token_packer"); must divide the width of their features.
        compressor_attention: The compressor "query" as "multi_head" attention with layer norms and linear maps (code),
            or "bare": softmax((Q + PE)(H + PE)^T) H, unscaled and without weights of its own (equation 2).
        compressor_positions: Its position table: "query_grid", a C x C table resized to the patches (code), which with
            C = 1 is one vector for all, or "own_grid", a sine-cosine table for queries and patches each.
        compress_before_projection: Compress the vision tower's features (code) or the projected ones (equation 2).
        prefusion_layers: Decoder layers that fuse the text with the patches ahead of the language model; 0 for none.
        prefusion_init: What new pre-fusion layers start from: "fresh" for the language model's own random
            initialisation, "language_model" for a copy of its first `prefusion_layers` layers, "identity" for a copy
            whose attention and MLP give zero, so that text and visual tokens pass unchanged until the layers have
            learned (block expansion, Wu et al. 2024, LLaMA Pro), or a .safetensors file with names such as
            `0.self_attn.q_proj.weight`, as the official `--pretrain_prefusion` takes it.
        prefuse_visual_tokens: The language model gets its visual tokens as they leave pre-fusion (code), or as they
            were before it (equation 3, where pre-fusion gives the text only).
        keep_patches: The language model sees the patches that were compressed too, ahead of the compressed tokens: for
            pre-fusion within its own first layers (paper Table 12), from which the caller has to drop the patches.
        detach_embeddings: Keep gradients from the text embeddings, as the released training code does; the paper
            trains all but the vision tower.
        frames_per_chunk: Frames that go through vision tower, compressor and pre-fusion at once. Trades memory for
            speed and changes no result.

    Raises:
        ValueError: If a field has a value outside its range.
    """

    model_type = "llava_mini"

    compressor: str = "query"
    compressor_size: int = 1
    compressor_heads: int = 8
    compressor_attention: str = "multi_head"
    compressor_positions: str = "query_grid"
    compress_before_projection: bool = True
    prefusion_layers: int = 4
    prefusion_init: str = "fresh"
    prefuse_visual_tokens: bool = True
    keep_patches: bool = False
    detach_embeddings: bool = False
    frames_per_chunk: int = 32

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
        least = {"compressor_size": 0, "compressor_heads": 1, "prefusion_layers": 0, "frames_per_chunk": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < bound:
                raise ValueError(f"{name} must be an integer of at least {bound}; got {value!r}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}")
        if self.keep_patches and (self.compressor == "none" or not self.compressor_size or self.prefusion_layers):
            raise ValueError(
                "keep_patches puts patches beside compressed tokens into the language model, in place of pre-fusion ahead "
                "of it: give a compressor with compressor_size of at least 1, and prefusion_layers=0"
            )
        if self.compressor != "none" and not (self.compressor_size or self.prefusion_layers):
            raise ValueError(
                "compressor_size=0 with prefusion_layers=0 leaves the picture no way to the language model"
            )
        if self.prefusion_init not in ("fresh", *COPIES) and not self.prefusion_init.endswith(".safetensors"):
            raise ValueError(
                "prefusion_init must be 'fresh', 'language_model', 'identity' or a .safetensors file; "
                f"got {self.prefusion_init!r}"
            )
        layers = self.get_text_config().num_hidden_layers
        if self.prefusion_init in COPIES and self.prefusion_layers > layers:
            raise ValueError(
                f"prefusion_init={self.prefusion_init!r} copies at most the language model's {layers} layers; "
                f"got prefusion_layers={self.prefusion_layers}"
            )

    @property
    def vision_width(self) -> int:
        """Width of the vision tower's features, concatenated over the selected layers."""
        layers = 1 if isinstance(self.vision_feature_layer, int) else len(self.vision_feature_layer)
        return cast(PreTrainedConfig, self.vision_config).hidden_size * layers

    @property
    def compressor_width(self) -> int:
        """Width of the features that the compressor takes in and of the tokens that it returns."""
        return self.vision_width if self.compress_before_projection else self.get_text_config().hidden_size

    def num_visual_tokens(self, patches: int) -> int:
        """How many tokens the language model sees of an image that the vision tower cut into `patches` patches."""
        if self.compressor == "none":
            return patches
        return self.compressor_size**2 + (patches if self.keep_patches else 0)


__all__ = ["PRESETS", "LlavaMiniConfig"]
