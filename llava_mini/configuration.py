"""Configuration of LLaVA-Mini and the presets of its two published variants."""

from __future__ import annotations

from typing import Any, cast

from huggingface_hub.dataclasses import strict
from transformers import LlavaConfig, PreTrainedConfig

from .compressors import COMPRESSORS

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
"""The fields in which the released code and the paper differ. The published numbers belong to "code"."""
FIELD_CHOICES = {
    "compressor_attention": ("multi_head", "bare"),
    "compressor_positions": ("query_grid", "own_grid"),
}
# Values of `prefusion_init` that copy the language model's first layers.
COPYING_INITS = ("language_model", "identity")


@strict
class LlavaMiniConfig(LlavaConfig):
    r"""Configuration of a [`LlavaMiniModel`]: a [`LlavaConfig`] with compression and modality pre-fusion.

    Both are described in section 4 of LLaVA-Mini (arXiv 2501.03895). The defaults are those of the released checkpoint:
    one visual token per image, four pre-fusion layers and the order of the released code (ictnlp/LLaVA-Mini, commit
    47da113). `LlavaMiniConfig(**PRESETS["paper"])` follows the equations of the paper instead.

    Args:
        compressor (`str`, *optional*, defaults to `"query"`):
            How patches become visual tokens: a name in `llava_mini.compressors.COMPRESSORS`, or `"none"` to give the
            language model every patch.
        compressor_size (`int`, *optional*, defaults to 1):
            C: an image or a video frame becomes C x C visual tokens. With 0 the language model receives the image
            through pre-fusion only. The compressor `"none"` ignores this field.
        compressor_heads (`int`, *optional*, defaults to 8):
            Number of attention heads of the compressors that attend (`"query"`, `"nested_query"`, `"qformer"`,
            `"token_packer"`). It must divide the width of their features.
        compressor_attention (`str`, *optional*, defaults to `"multi_head"`):
            Attention of the compressor `"query"`. `"multi_head"` has layer norms and linear maps (code). `"bare"` is
            softmax((Q + PE)(H + PE)^T) H, unscaled and without further weights (equation 2).
        compressor_positions (`str`, *optional*, defaults to `"query_grid"`):
            Position table of the compressor `"query"`. `"query_grid"` is a C x C table resized to the patch grid
            (code); with C = 1 it is one vector for all patches. `"own_grid"` is a sine-cosine table for queries and
            another for patches.
        compress_before_projection (`bool`, *optional*, defaults to `True`):
            Whether to compress the vision tower's features (code) or the projected features (equation 2).
        prefusion_layers (`int`, *optional*, defaults to 4):
            Number of decoder layers that fuse text with patches ahead of the language model. 0 disables pre-fusion.
        prefusion_init (`str`, *optional*, defaults to `"fresh"`):
            Initial weights of new pre-fusion layers:

            - `"fresh"`: the random initialisation of the language model.
            - `"language_model"`: a copy of the language model's first `prefusion_layers` layers.
            - `"identity"`: such a copy whose attention and MLP output zero. Text and visual tokens pass unchanged until
              the layers are trained (block expansion; Wu et al. 2024, LLaMA Pro).
            - a .safetensors file with names such as `0.self_attn.q_proj.weight`, as the official
              `--pretrain_prefusion` reads it.
        prefuse_visual_tokens (`bool`, *optional*, defaults to `True`):
            Whether the language model receives the visual tokens as pre-fusion outputs them (code), or as they enter
            pre-fusion (equation 3, where pre-fusion returns only text).
        keep_patches (`bool`, *optional*, defaults to `False`):
            Whether the language model also receives the uncompressed patches, ahead of the compressed tokens. This
            serves pre-fusion within the language model's own first layers (paper Table 12). The caller must then drop
            the patches after those layers.
        detach_embeddings (`bool`, *optional*, defaults to `False`):
            Whether to block gradients to the text embeddings, as the released training code does. The paper trains
            everything except the vision tower.
        frames_per_chunk (`int`, *optional*):
            Number of frames that pass through vision tower, compressor and pre-fusion at once. It trades memory for
            speed and does not change results. None chooses it by the size of their activations: on a CPU they stay in
            its cache.

    Raises:
        ValueError: If a field has a value outside its range.

    Example:
        >>> from llava_mini import PRESETS, LlavaMiniConfig
        >>> config = LlavaMiniConfig(compressor_size=2, **PRESETS["paper"])
        >>> config.num_visual_tokens(patches=576)
        4
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
    frames_per_chunk: int | None = None

    def __post_init__(self, **kwargs):
        # An ordinary LLaVA's config.json has model_type "llava". As an attribute it would mislead transformers.
        kwargs.pop("model_type", None)
        super().__post_init__(**kwargs)
        self.check()

    def check(self) -> None:
        """Check that every field is in its range.

        `__post_init__` calls this, and so does the model: `from_pretrained(folder, compressor_size=2)` sets fields after
        the configuration was built.

        Raises:
            ValueError: If a field is out of range.
        """
        if self.compressor not in ("none", *COMPRESSORS):
            registered = ", ".join(sorted(COMPRESSORS))
            raise ValueError(f"compressor must be 'none' or one of {registered}; got {self.compressor!r}")
        minimums = {"compressor_size": 0, "compressor_heads": 1, "prefusion_layers": 0}
        if self.frames_per_chunk is not None:
            minimums["frames_per_chunk"] = 1
        for name, minimum in minimums.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < minimum:
                raise ValueError(f"{name} must be an integer of at least {minimum}; got {value!r}")
        for name, choices in FIELD_CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}")
        if self.keep_patches and (self.compressor == "none" or not self.compressor_size or self.prefusion_layers):
            raise ValueError(
                "keep_patches=True needs a compressor, compressor_size of at least 1 and prefusion_layers=0; "
                f"got compressor={self.compressor!r}, compressor_size={self.compressor_size}, "
                f"prefusion_layers={self.prefusion_layers}"
            )
        if self.compressor != "none" and not (self.compressor_size or self.prefusion_layers):
            raise ValueError(
                "compressor_size=0 with prefusion_layers=0 gives the language model nothing of the image; "
                "set one of them to at least 1"
            )
        if self.prefusion_init not in ("fresh", *COPYING_INITS) and not self.prefusion_init.endswith(".safetensors"):
            raise ValueError(
                "prefusion_init must be 'fresh', 'language_model', 'identity' or a .safetensors file; "
                f"got {self.prefusion_init!r}"
            )
        if self.keep_patches and self.encoded_side is not None:
            raise ValueError(
                f"keep_patches=True needs patches at full resolution; compressor={self.compressor!r} encodes small images"
            )
        selected = self.vision_feature_layer
        vision_layers = getattr(self.vision_config, "num_hidden_layers", None)
        for layer in [selected] if isinstance(selected, int) else selected:
            if vision_layers is not None and not -vision_layers - 1 <= layer <= vision_layers:
                raise ValueError(
                    f"vision_feature_layer must be from {-vision_layers - 1} to {vision_layers} with {vision_layers} "
                    f"layers in the vision tower; got {selected}"
                )
        num_layers = self.get_text_config().num_hidden_layers
        if self.prefusion_init in COPYING_INITS and self.prefusion_layers > num_layers:
            raise ValueError(
                f"prefusion_init={self.prefusion_init!r} copies at most the language model's {num_layers} layers; "
                f"got prefusion_layers={self.prefusion_layers}"
            )

    @property
    def vision_width(self) -> int:
        """Return the width of the vision tower's features, concatenated over the selected layers."""
        num_layers = 1 if isinstance(self.vision_feature_layer, int) else len(self.vision_feature_layer)
        return cast(PreTrainedConfig, self.vision_config).hidden_size * num_layers

    @property
    def compressor_width(self) -> int:
        """Return the width of the compressor's input features and output tokens."""
        return self.vision_width if self.compress_before_projection else self.get_text_config().hidden_size

    @property
    def encoded_side(self) -> int | None:
        """Return the patches per side at which the compressor wants each crop encoded; None for full resolution."""
        compressor = COMPRESSORS.get(self.compressor)
        encodes_small_images = compressor is not None and compressor.encodes_small_images
        return self.compressor_size if encodes_small_images and self.compressor_size else None

    def num_visual_tokens(self, patches: int) -> int:
        """Return how many visual tokens the language model receives for one image or video frame.

        Args:
            patches (`int`): Number of patches that the vision tower makes of the image, over all its tiles.
        """
        if self.compressor == "none":
            return patches
        return self.compressor_size**2 + (patches if self.keep_patches else 0)


__all__ = ["PRESETS", "LlavaMiniConfig"]
