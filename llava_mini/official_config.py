"""Configuration, tokenizer and processor of a checkpoint in the layout of the official code, converted to ours."""

from __future__ import annotations

import os
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AddedToken,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    PreTrainedConfig,
)

from .chat_templates import LLAMA_3_TEMPLATE, VICUNA_TEMPLATE
from .checkpoint import read_json
from .configuration import PRESETS, LlavaMiniConfig
from .processing import LlavaMiniProcessor

# Configuration of openai/clip-vit-large-patch14-336, the vision tower of the released checkpoints.
CLIP_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
IMAGE_TOKEN = "<image>"


def read_config(
    src: Path, vision_tower: str | os.PathLike[str] | None
) -> tuple[dict[str, Any], Path | None, LlavaMiniConfig]:
    """Read the official config.json of the folder `src`, and build our configuration from it.

    Args:
        src: Folder of the official checkpoint.
        vision_tower: Folder of the vision tower; by default the one that `mm_vision_tower` in config.json names.

    Returns:
        The official fields, the folder of the vision tower (None if there is none), and our configuration.

    Raises:
        FileNotFoundError: If config.json or the vision tower's folder does not exist, or no configuration of the vision
            tower is available.
        ValueError: If a field is missing or has a value that our model does not support.
    """
    path = src / "config.json"
    official = read_json(path)
    convertible = {
        "model_type": ("llava_mini_llama",),
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_vision_select_feature": ("patch", "cls_patch", None),
        "mm_use_im_start_end": (False, None),
    }
    for name, values in convertible.items():
        if official.get(name) not in values:
            raise ValueError(f"{path}: {name} is {official.get(name)!r}, and only {values[0]!r} can be converted")
    if "compressor_size" not in official:
        raise ValueError(f"{path} has no compressor_size: the official code builds plain LLaVA from it, not LLaVA-Mini")
    if "mm_vision_select_layer" not in official:
        raise ValueError(f"{path} has no mm_vision_select_layer")

    vision_folder = _find_vision_tower(src, official, vision_tower)
    if vision_folder is not None:
        vision = read_json(vision_folder / "config.json")
        vision = vision.get("vision_config", vision)
        if vision.get("model_type") not in ("clip", "clip_vision_model"):
            raise ValueError(
                f"{vision_folder / 'config.json'}: model_type is {vision.get('model_type')!r}; "
                "LLaVA-Mini's vision tower is CLIP, model_type 'clip' or 'clip_vision_model'"
            )
    elif str(official.get("mm_vision_tower")).endswith("clip-vit-large-patch14-336"):
        vision = CLIP_L_336
    else:
        raise FileNotFoundError(describe_missing_vision_tower(src, official))
    keeps_class_token = official.get("mm_vision_select_feature") == "cls_patch"
    try:
        text_config = LlamaConfig(**_select_own_fields(LlamaConfig, official))
        config = LlavaMiniConfig(
            vision_config=CLIPVisionConfig(**_select_own_fields(CLIPVisionConfig, vision)),
            text_config=text_config,
            image_token_index=text_config.vocab_size,
            vision_feature_layer=official["mm_vision_select_layer"],
            vision_feature_select_strategy="full" if keeps_class_token else "default",
            tie_word_embeddings=text_config.tie_word_embeddings,
            compressor_size=official["compressor_size"],
            prefusion_layers=official.get("prefusion_layer_num", 4),
            **PRESETS["code"],
        )
    except StrictDataclassError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    return official, vision_folder, config


def describe_missing_vision_tower(src: Path, official: dict[str, Any]) -> str:
    """Return the error message for a checkpoint whose vision tower has no weights, with the three ways to give them."""
    return (
        f"{src} has no weights of a vision tower: name its folder with --vision-tower, name it as mm_vision_tower in "
        f"{src / 'config.json'} (now {official.get('mm_vision_tower')!r}), or use a checkpoint with "
        "model.vision_tower.* weights"
    )


def write_generation_config(src: Path, config: LlavaMiniConfig, out: Path) -> None:
    """Copy generation_config.json from `src` to `out`, or write one with the special tokens of `config`."""
    if (src / "generation_config.json").is_file():
        shutil.copyfile(src / "generation_config.json", out / "generation_config.json")
        return
    text = config.get_text_config()
    GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id
    ).save_pretrained(out)


def read_tokenizer(src: Path, config: LlavaMiniConfig) -> Any:
    """Read the tokenizer in `src`, add `<image>` after its last token and set our chat template.

    Returns:
        The tokenizer, or None if the folder has none.

    Raises:
        ValueError: If its files cannot be read.
    """
    if not any((src / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        return None
    # Pass the configuration, because transformers does not know the model_type of the one in the folder.
    try:
        tokenizer = AutoTokenizer.from_pretrained(src, config=config.get_text_config(), local_files_only=True)
    except Exception as error:  # the tokenizers library raises no narrower class
        raise ValueError(f"the tokenizer in {src} cannot be read: {' '.join(str(error).split())}") from error
    vocabulary = tokenizer.get_vocab()
    if IMAGE_TOKEN not in vocabulary:
        tokenizer.add_tokens(AddedToken(IMAGE_TOKEN, special=True, normalized=False), special_tokens=True)
    is_llama_3 = {"<|start_header_id|>", "<|eot_id|>"} <= vocabulary.keys()
    tokenizer.chat_template = LLAMA_3_TEMPLATE if is_llama_3 else VICUNA_TEMPLATE
    if tokenizer.pad_token is None and "<|finetune_right_pad_id|>" in vocabulary:
        tokenizer.pad_token = "<|finetune_right_pad_id|>"  # as the official code does
    return tokenizer


def build_processor(
    official: dict[str, Any], config: LlavaMiniConfig, vision_folder: Path | None, tokenizer: Any
) -> LlavaMiniProcessor:
    """Build the processor from the tokenizer and from the image processor of the vision tower's folder.

    Without such a folder the image processor is CLIP's at the vision tower's image size.
    """
    vision = config.vision_config
    if vision_folder is not None and (vision_folder / "preprocessor_config.json").is_file():
        image_processor = CLIPImageProcessorPil.from_pretrained(vision_folder)
    else:
        side = vision.image_size
        image_processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return LlavaMiniProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=tokenizer.chat_template,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,  # CLIP's class token
        num_visual_tokens=config.compressor_size**2,
        tiles=official.get("resolution_ratio") or 1,
        pad_to_square=official.get("image_aspect_ratio") == "pad",
    )


def _find_vision_tower(src: Path, official: dict[str, Any], vision_tower: str | os.PathLike[str] | None) -> Path | None:
    if vision_tower is not None:
        if not Path(vision_tower).is_dir():
            raise FileNotFoundError(f"the vision tower {vision_tower} is not a folder")
        return Path(vision_tower)
    name = official.get("mm_vision_tower")
    candidates = [Path(name), src / name] if name else []
    return next((folder for folder in candidates if (folder / "config.json").is_file()), None)


def _select_own_fields(config_class: type[PreTrainedConfig], values: dict[str, Any]) -> dict[str, Any]:
    """Select the fields that `config_class` adds to the base class, and rope parameters under their former names."""
    own = {field.name for field in fields(config_class)} - {field.name for field in fields(PreTrainedConfig)}
    return {name: value for name, value in values.items() if name in own | {"rope_theta", "rope_scaling"}}


__all__ = [
    "CLIP_L_336",
    "IMAGE_TOKEN",
    "build_processor",
    "describe_missing_vision_tower",
    "read_config",
    "read_tokenizer",
    "write_generation_config",
]
