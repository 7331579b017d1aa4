"""Tiny random models of Mistral 3, Pixtral, Llama 4, Aya Vision and BLIP-2, with their own processors."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import Gemma3nVisionConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tests.probes.tokens.families.tiny_family import TEXT, VISION, TinyFamily, tokenizer
from tests.probes.tokens.families.torchvision_stand_in import import_with_torchvision
from tests.probes.tokens.families.video_processors import without_video_processor

PIXTRAL_VISION = VISION | {"model_type": "pixtral", "head_dim": 8, "image_size": 64, "patch_size": 4}


def mistral3() -> TinyFamily:
    merge = 2

    def config(tokens: PreTrainedTokenizerFast) -> PretrainedConfig:
        return transformers.Mistral3Config(
            vision_config=PIXTRAL_VISION,
            text_config=TEXT
            | {"model_type": "mistral", "vocab_size": len(tokens), "head_dim": 8, "sliding_window": None},
            image_token_index=tokens.convert_tokens_to_ids("[IMG]"),
            spatial_merge_size=merge,
            tie_word_embeddings=False,
        )

    processor = _pixtral_processor(merge)
    return TinyFamily(transformers.Mistral3ForConditionalGeneration, config, processor, "[IMG]")


def pixtral() -> TinyFamily:
    """Return a LLaVA with the vision tower and the processor of Pixtral."""

    def config(tokens: PreTrainedTokenizerFast) -> PretrainedConfig:
        return transformers.LlavaConfig(
            vision_config=PIXTRAL_VISION,
            text_config=TEXT
            | {"model_type": "mistral", "vocab_size": len(tokens), "head_dim": 8, "sliding_window": None},
            image_token_index=tokens.convert_tokens_to_ids("[IMG]"),
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )

    return TinyFamily(transformers.LlavaForConditionalGeneration, config, _pixtral_processor(1), "[IMG]")


def _pixtral_processor(merge: int) -> Any:
    patch = PIXTRAL_VISION["patch_size"]
    processor = import_with_torchvision("transformers.models.pixtral.processing_pixtral").PixtralProcessor
    images = transformers.PixtralImageProcessorPil(size={"longest_edge": 40}, patch_size=patch)
    tokens = tokenizer(["[IMG]", "[IMG_BREAK]", "[IMG_END]"])
    return processor(images, tokens, patch_size=patch, spatial_merge_size=merge)


def llama4() -> TinyFamily:
    """Return a Llama 4 with two chunked layers, one of them dense, and one layer without rotary embeddings."""
    tile, patch, width = 16, 4, 16
    marks = ["<|image|>", "<|image_start|>", "<|image_end|>", "<|patch|>"]
    tokens = tokenizer([*marks, "<|tile_x_separator|>", "<|tile_y_separator|>"])

    def config(tokens: PreTrainedTokenizerFast) -> PretrainedConfig:
        vision = {"vision_output_dim": width, "projector_input_dim": width, "projector_output_dim": width}
        text = {
            "vocab_size": len(tokens),
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "moe_layers": [0, 2],
            "no_rope_layers": [1, 0, 1],
            "attention_chunk_size": 16,
        }
        return transformers.Llama4Config(
            vision_config=VISION
            | {"hidden_size": width, "intermediate_size": 4 * width, "image_size": tile, "patch_size": patch, **vision},
            text_config=TEXT | text,
            image_token_index=tokens.convert_tokens_to_ids("<|patch|>"),
        )

    module = import_with_torchvision("transformers.models.llama4.image_processing_llama4")

    class Images(module.Llama4ImageProcessor):  # type: ignore[misc, name-defined]
        """The image processor without its bfloat16, whose rounding would shift the colours."""

        rescale_and_normalize = module.TorchvisionBackend.rescale_and_normalize

    images = Images(size={"height": tile, "width": tile}, max_patches=6)
    processor = transformers.Llama4Processor(images, tokens, patch_size=patch)
    return TinyFamily(transformers.Llama4ForConditionalGeneration, config, processor, "<|image|>")


def aya_vision() -> TinyFamily:
    tile, patch, factor = 16, 4, 2
    marks = ["<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "TILE_GLOBAL"]
    tokens = tokenizer([*marks, *(f"TILE_{number}" for number in range(1, 7))])

    def config(tokens: PreTrainedTokenizerFast) -> PretrainedConfig:
        # Two layers have a sliding window shorter than the prompt; one attends to all of it.
        text = {
            "model_type": "cohere2",
            "vocab_size": len(tokens),
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        }
        return transformers.AyaVisionConfig(
            vision_config=VISION
            | {"model_type": "siglip_vision_model", "image_size": tile, "patch_size": patch, "vision_use_head": False},
            text_config=TEXT | text,
            image_token_index=tokens.convert_tokens_to_ids("<|IMG_PATCH|>"),
            downsample_factor=factor,
        )

    images = transformers.GotOcr2ImageProcessorPil(size={"height": tile, "width": tile}, max_patches=6)
    processor = transformers.AyaVisionProcessor(
        images, tokens, patch_size=patch, img_size=tile, downsample_factor=factor
    )
    return TinyFamily(transformers.AyaVisionForConditionalGeneration, config, processor, "<image>")


def blip_2() -> TinyFamily:
    """Return a BLIP-2 whose processor leaves the query tokens to the text, so that a row has any number of images."""
    side, queries = 16, 4

    def config(tokens: PreTrainedTokenizerFast) -> PretrainedConfig:
        text = {"model_type": "opt", "ffn_dim": 48, "init_std": 0.2, "word_embed_proj_dim": 32, "dropout": 0.0}
        return transformers.Blip2Config(
            vision_config=VISION | {"image_size": side, "patch_size": 4},
            qformer_config=VISION | {"encoder_hidden_size": 16, "initializer_range": 0.2},
            text_config=TEXT | {"vocab_size": len(tokens), **text},
            num_query_tokens=queries,
            image_token_index=tokens.convert_tokens_to_ids("<image>"),
        )

    images = transformers.BlipImageProcessorPil(size={"height": side, "width": side})
    processor = transformers.Blip2Processor(images, tokenizer(["<image>"]))
    return TinyFamily(transformers.Blip2ForConditionalGeneration, config, processor, queries * "<image>")


class StandInVisionConfig(Gemma3nVisionConfig):  # type: ignore[misc]
    """A class of its own: transformers 5.17 ignores a model that is registered for one of its configurations."""


class StandInVision(PreTrainedModel):  # type: ignore[misc]
    """Stand-in for the vision tower of Gemma 3n, which needs timm: one convolution makes the square of features."""

    config_class = StandInVisionConfig
    _supports_sdpa = _supports_flex_attn = _supports_flash_attn = True

    def __init__(self, config: StandInVisionConfig) -> None:
        super().__init__(config)
        self.patches = torch.nn.Conv2d(3, config.hidden_size, kernel_size=8, stride=8)

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(last_hidden_state=self.patches(pixel_values))


def gemma3n() -> TinyFamily:
    """Return a Gemma 3n of two layers with keys and one that shares those of the first."""
    side, soft_tokens = 24, 9
    marks = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    audio = {"boa_token": "<start_of_audio>", "eoa_token": "<end_of_audio>", "audio_token": "<audio_soft_token>"}
    tokens = tokenizer(**marks, **audio)
    transformers.AutoModel.register(StandInVisionConfig, StandInVision, exist_ok=True)

    def config(tokens: PreTrainedTokenizerFast) -> PretrainedConfig:
        text = {
            "vocab_size": len(tokens),
            "vocab_size_per_layer_input": len(tokens),
            "hidden_size_per_layer_input": 8,
            "head_dim": 8,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "num_kv_shared_layers": 1,
            "altup_num_inputs": 2,
            "laurel_rank": 4,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0],
        }
        audio = {"hidden_size": 8, "conf_num_attention_heads": 2, "conf_num_hidden_layers": 1}
        return transformers.Gemma3nConfig(
            text_config=TEXT | text,
            vision_config=StandInVisionConfig(hidden_size=16, vocab_size=4, vocab_offset=len(tokens)),
            audio_config=audio | {"vocab_size": 4, "vocab_offset": len(tokens) + 4, "sscp_conv_channel_size": [4, 4]},
            image_token_id=tokens.image_token_id,
            audio_token_id=tokens.audio_token_id,
            boi_token_id=tokens.boi_token_id,
            eoi_token_id=tokens.eoi_token_id,
            vision_soft_tokens_per_image=soft_tokens,
        )

    images = transformers.SiglipImageProcessorPil(size={"height": side, "width": side})
    processor = transformers.Gemma3nProcessor(
        transformers.Gemma3nAudioFeatureExtractor(), images, tokens, image_seq_length=soft_tokens
    )
    return TinyFamily(transformers.Gemma3nForConditionalGeneration, config, processor, "<image_soft_token>")


def gemma4() -> TinyFamily:
    """Return a Gemma 4 whose last two layers share the keys of the first ones of their kind."""
    patch, pool = 2, 2
    marks = {"boi_token": "<|image>", "eoi_token": "<image|>", "image_token": "<|image|>"}
    audio = {"boa_token": "<|audio>", "eoa_token": "<audio|>", "audio_token": "<|audio|>"}
    tokens = tokenizer(["<|video|>"], **marks, **audio)

    def config(tokens: PreTrainedTokenizerFast) -> PretrainedConfig:
        text = {
            "vocab_size": len(tokens),
            "vocab_size_per_layer_input": len(tokens),
            "hidden_size_per_layer_input": 8,
            "head_dim": 8,
            "global_head_dim": 16,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "num_kv_shared_layers": 1,
        }
        return transformers.Gemma4Config(
            text_config=TEXT | text,
            vision_config=VISION
            | {"num_key_value_heads": 2, "head_dim": 8, "patch_size": patch, "pooling_kernel_size": pool},
            audio_config=None,
            image_token_id=tokens.image_token_id,
            video_token_id=tokens.convert_tokens_to_ids("<|video|>"),
            audio_token_id=tokens.audio_token_id,
        )

    images = transformers.Gemma4ImageProcessorPil(patch_size=patch, pooling_kernel_size=pool, max_soft_tokens=70)
    module = import_with_torchvision("transformers.models.gemma4.processing_gemma4")  # transformers 5.17 needs it
    processor = without_video_processor(module.Gemma4Processor)(
        transformers.Gemma4AudioFeatureExtractor(), images, tokens, None
    )
    return TinyFamily(transformers.Gemma4ForConditionalGeneration, config, processor, "<|image|>")


RECENT_FAMILIES = (mistral3, pixtral, llama4, aya_vision, blip_2, gemma3n, gemma4)
