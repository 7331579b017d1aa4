"""Tiny random models of every family with their own processors and a byte tokenizer; nothing is downloaded."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import transformers
from transformers import PretrainedConfig, PreTrainedTokenizerFast, ProcessorMixin
from transformers.models.smolvlm import processing_smolvlm

from llava_mini import LlavaMiniConfig, LlavaMiniForConditionalGeneration, LlavaMiniProcessor
from tests.probes.tokens.families.build_recent import RECENT_FAMILIES
from tests.probes.tokens.families.tiny_family import LAYERS, TEXT, VISION, TinyFamily, tokenizer
from tests.probes.tokens.families.video_processors import QwenFrames, WholeFrames, without_video_processor

__all__ = ["LAYERS", "MODEL_FAMILIES", "TinyFamily", "tiny"]


def qwen(name: str, version: str, vision: dict[str, Any], text: dict[str, Any]) -> TinyFamily:
    patch, merge = 4, 2
    tokens = tokenizer(
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
    )
    images = transformers.Qwen2VLImageProcessorPil(
        patch_size=patch, merge_size=merge, size={"shortest_edge": 256, "longest_edge": 2048}
    )

    def config(tokens: PreTrainedTokenizerFast) -> PretrainedConfig:
        ids = {
            f"{key}_token_id": getattr(tokens, f"{key}_token_id")
            for key in ("image", "video", "vision_start", "vision_end")
        }
        return getattr(transformers, f"{version}Config")(
            vision_config={"patch_size": patch, "spatial_merge_size": merge, "num_heads": 2, **vision},
            text_config=TEXT | {"vocab_size": len(tokens), **text},
            **ids,
        )

    processor = without_video_processor(getattr(transformers, f"{name}Processor"))
    return TinyFamily(
        getattr(transformers, f"{version}ForConditionalGeneration"),
        config,
        processor(images, tokens, QwenFrames(images)),
        "<|vision_start|><|image_pad|><|vision_end|>",
        "visual",
    )


def qwen2_vl() -> TinyFamily:
    text = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    return qwen("Qwen2VL", "Qwen2VL", {"embed_dim": 16, "hidden_size": 32, "depth": 2, "mlp_ratio": 2}, text)


def qwen2_5_vl() -> TinyFamily:
    text = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    vision = {"hidden_size": 16, "out_hidden_size": 32, "depth": 2, "intermediate_size": 24}
    # The vision tower attends within windows of 2 x 2 merged patches.
    windows = {"window_size": 16, "fullatt_block_indexes": [1]}
    return qwen("Qwen2_5_VL", "Qwen2_5_VL", vision | windows, text)


def qwen3_vl() -> TinyFamily:
    text = {"head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    vision = {"hidden_size": 16, "out_hidden_size": 32, "depth": 2, "intermediate_size": 24}
    deep = {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    return qwen("Qwen3VL", "Qwen3VL", vision | deep, text)


def qwen3_5() -> TinyFamily:
    """Return a Qwen3.5 of one layer with linear attention and two with softmax attention."""
    text = {
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention", "full_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    vision = {"hidden_size": 16, "out_hidden_size": 32, "depth": 2, "intermediate_size": 24}
    return qwen("Qwen3VL", "Qwen3_5", vision | {"num_position_embeddings": 64}, text)


def idefics3() -> TinyFamily:
    return _idefics(transformers.Idefics3Processor, "Idefics3")


def smolvlm() -> TinyFamily:
    # Its processor needs a package that spells out the number of video frames.
    processing_smolvlm.num2words = processing_smolvlm.num2words or str
    return _idefics(transformers.SmolVLMProcessor, "SmolVLM")


def _idefics(processor: type[ProcessorMixin], version: str) -> TinyFamily:
    tile, patch, scale = 16, 4, 2
    tags = [f"<row_{row + 1}_col_{column + 1}>" for row in range(6) for column in range(6)]
    specials = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", "<video>", *tags]
    images = getattr(transformers, f"{version}ImageProcessorPil")(
        size={"longest_edge": 4 * tile}, max_image_size={"longest_edge": tile}
    )
    tokens, sequence = tokenizer(specials), (tile // patch // scale) ** 2
    frames = WholeFrames(images, "pixel_values", do_image_splitting=False)
    arguments = [images, tokens] if version == "Idefics3" else [images, tokens, frames]

    def config(tokens: PreTrainedTokenizerFast) -> PretrainedConfig:
        return getattr(transformers, f"{version}Config")(
            vision_config=VISION | {"image_size": tile, "patch_size": patch},
            text_config=TEXT | {"model_type": "llama", "vocab_size": len(tokens)},
            image_token_id=tokens.convert_tokens_to_ids("<image>"),
            scale_factor=scale,
            pad_token_id=0,
        )

    return TinyFamily(
        getattr(transformers, f"{version}ForConditionalGeneration"),
        config,
        without_video_processor(processor)(*arguments, image_seq_len=sequence),
        "<image>",
    )


def paligemma() -> TinyFamily:
    side, patch = 20, 4
    images = transformers.SiglipImageProcessorPil(size={"height": side, "width": side})
    images.image_seq_length = (side // patch) ** 2

    def config(tokens: PreTrainedTokenizerFast) -> PretrainedConfig:
        return transformers.PaliGemmaConfig(
            vision_config=VISION | {"model_type": "siglip_vision_model", "image_size": side, "patch_size": patch},
            text_config=TEXT | {"model_type": "gemma", "vocab_size": len(tokens), "head_dim": 8},
            image_token_index=tokens.convert_tokens_to_ids("<image>"),
            projection_dim=32,
            hidden_size=32,
        )

    processor = transformers.PaliGemmaProcessor(images, tokenizer(image_token="<image>"))
    return TinyFamily(transformers.PaliGemmaForConditionalGeneration, config, processor, "<image>")


def gemma3() -> TinyFamily:
    side, patch, pooled = 24, 4, 3
    tokens = tokenizer(boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>")
    images = transformers.Gemma3ImageProcessorPil(size={"height": side, "width": side})

    def config(tokens: PreTrainedTokenizerFast) -> PretrainedConfig:
        # Two layers have a sliding window shorter than the prompt; one attends to all of it.
        text = {
            "vocab_size": len(tokens),
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        }
        return transformers.Gemma3Config(
            vision_config=VISION | {"model_type": "siglip_vision_model", "image_size": side, "patch_size": patch},
            text_config=TEXT | text,
            mm_tokens_per_image=pooled**2,
            boi_token_index=tokens.boi_token_id,
            eoi_token_index=tokens.eoi_token_id,
            image_token_index=tokens.image_token_id,
        )

    processor = transformers.Gemma3Processor(images, tokens, image_seq_length=pooled**2)
    return TinyFamily(transformers.Gemma3ForConditionalGeneration, config, processor, "<start_of_image>")


def internvl() -> TinyFamily:
    tile, patch = 16, 4
    tokens = tokenizer(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>"
    )
    sequence = (tile // patch // 2) ** 2
    images = transformers.GotOcr2ImageProcessorPil(size={"height": tile, "width": tile}, max_patches=6)

    def config(tokens: PreTrainedTokenizerFast) -> PretrainedConfig:
        return transformers.InternVLConfig(
            vision_config=VISION | {"image_size": [tile, tile], "patch_size": [patch, patch]},
            text_config=TEXT | {"model_type": "qwen2", "vocab_size": len(tokens)},
            image_token_id=tokens.context_image_token_id,
            image_seq_length=sequence,
        )

    frames = WholeFrames(images, "pixel_values_videos")
    processor = without_video_processor(transformers.InternVLProcessor)(
        images, tokens, frames, image_seq_length=sequence
    )
    return TinyFamily(transformers.InternVLForConditionalGeneration, config, processor, "<IMG_CONTEXT>")


def llava() -> TinyFamily:
    side, patch = 16, 4

    def config(tokens: PreTrainedTokenizerFast) -> PretrainedConfig:
        return transformers.LlavaConfig(**_llava_fields(tokens, side, patch))

    processor = transformers.LlavaProcessor(
        _clip_images(side), tokenizer(image_token="<image>"), **_clip_processor_fields(patch)
    )
    return TinyFamily(transformers.LlavaForConditionalGeneration, config, processor, "<image>")


def llava_next() -> TinyFamily:
    side, patch = 16, 4
    pinpoints = [[2 * side, side], [side, 2 * side], [2 * side, 2 * side]]

    def config(tokens: PreTrainedTokenizerFast) -> PretrainedConfig:
        return transformers.LlavaNextConfig(**_llava_fields(tokens, side, patch), image_grid_pinpoints=pinpoints)

    images = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_grid_pinpoints=pinpoints
    )
    processor = transformers.LlavaNextProcessor(
        images, tokenizer(image_token="<image>"), **_clip_processor_fields(patch)
    )
    return TinyFamily(transformers.LlavaNextForConditionalGeneration, config, processor, "<image>")


def llava_onevision() -> TinyFamily:
    side, patch = 16, 4
    pinpoints = [[2 * side, side], [side, 2 * side], [2 * side, 2 * side]]

    def config(tokens: PreTrainedTokenizerFast) -> PretrainedConfig:
        return transformers.LlavaOnevisionConfig(
            vision_config=VISION | {"model_type": "siglip_vision_model", "image_size": side, "patch_size": patch},
            text_config=TEXT | {"model_type": "qwen2", "vocab_size": len(tokens)},
            image_token_index=tokens.convert_tokens_to_ids("<image>"),
            video_token_index=tokens.convert_tokens_to_ids("<video>"),
            image_grid_pinpoints=pinpoints,
            vision_feature_select_strategy="full",
        )

    images = transformers.LlavaOnevisionImageProcessorPil(
        size={"height": side, "width": side}, image_grid_pinpoints=pinpoints
    )
    tokens = tokenizer(image_token="<image>", video_token="<video>")
    processor = without_video_processor(transformers.LlavaOnevisionProcessor)(
        images, tokens, None, num_image_tokens=(side // patch) ** 2, vision_feature_select_strategy="full"
    )
    return TinyFamily(transformers.LlavaOnevisionForConditionalGeneration, config, processor, "<image>")


def llava_mini() -> TinyFamily:
    """Return a LLaVA-Mini with 2 x 2 tokens per image and two pre-fusion layers."""
    side, patch = 16, 4

    def config(tokens: PreTrainedTokenizerFast) -> PretrainedConfig:
        fields = {"compressor_size": 2, "compressor_heads": 2, "prefusion_layers": 2}
        return LlavaMiniConfig(**_llava_fields(tokens, side, patch), **fields)

    processor = LlavaMiniProcessor(
        _clip_images(side), tokenizer(image_token="<image>"), **_clip_processor_fields(patch), num_visual_tokens=4
    )
    return TinyFamily(LlavaMiniForConditionalGeneration, config, processor, "<image>")


def _llava_fields(tokens: PreTrainedTokenizerFast, side: int, patch: int) -> dict[str, Any]:
    return {
        "vision_config": VISION | {"model_type": "clip_vision_model", "image_size": side, "patch_size": patch},
        "text_config": TEXT | {"model_type": "llama", "vocab_size": len(tokens)},
        "image_token_index": tokens.convert_tokens_to_ids("<image>"),
    }


def _clip_images(side: int) -> transformers.CLIPImageProcessorPil:
    return transformers.CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def _clip_processor_fields(patch: int) -> dict[str, Any]:
    return {"patch_size": patch, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}


LLAVA_FAMILIES = (llava, llava_next, llava_onevision, llava_mini)
OTHER_FAMILIES = (qwen2_vl, qwen2_5_vl, qwen3_vl, idefics3, smolvlm, paligemma, gemma3, internvl)
MODEL_FAMILIES = {build.__name__: build for build in (*LLAVA_FAMILIES, *OTHER_FAMILIES, *RECENT_FAMILIES)}
# Families of which some layers have no softmax attention: their tests have files of their own.
HYBRID_FAMILIES = {"qwen3_5": qwen3_5}


@cache
def tiny(model_type: str) -> TinyFamily:
    """Return the tiny family; skip the test if its image processor needs torchvision in this transformers version."""
    try:
        return (MODEL_FAMILIES | HYBRID_FAMILIES)[model_type]()
    except ImportError as error:
        if "Torchvision" not in str(error):
            raise
        pytest.skip(f"{model_type}: its image processor needs torchvision in this transformers version")
