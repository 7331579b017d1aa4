"""A LLaVA built from a vision model and a language model, with a newly initialised projector."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

# `transformers.AutoImageProcessor` of version 5.17 needs torchvision; the class itself does not.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from experiments.data.samples import IMAGE_PLACEHOLDER

# Joins the parts of each message to one string, with a placeholder and a line break for each image or video. The text
# template that follows gets these strings.
_FLATTEN_MESSAGE_PARTS = (
    "{%- set flat = namespace(messages=[]) -%}{%- for message in messages -%}"
    "{%- set content -%}{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{{ '<' + part['type'] + '>\n' if part['type'] in ('image', 'video') else part['text'] }}{%- endfor -%}"
    "{%- endif -%}{%- endset -%}"
    "{%- set flat.messages = flat.messages + [{'role': message['role'], 'content': content}] -%}{%- endfor -%}"
    "{%- set messages = flat.messages -%}"
)


def multimodal_chat_template(text_template: str) -> str:
    """Return a language model's chat template that also accepts messages with images and videos."""
    return _FLATTEN_MESSAGE_PARTS + text_template


def build_llava_from_parts(
    vision: str, language: str, vision_layer: int, grid: int | None, dtype: torch.dtype, attention: str
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Build a LLaVA from a vision model and a language model.

    The projector and the embedding of the image token are drawn from torch's current seed.

    Args:
        vision: Folder or hub name of any Auto vision model that returns patch features after one class token.
        language: Folder or hub name of any Auto decoder with a chat template.
        vision_layer: Hidden states of the vision tower that the projector reads; -2 is the second last layer.
        grid: Patches per side that images are resized to; by default those of the vision model's image processor. A
            vision tower that cannot interpolate its position embeddings rejects any other grid.
        dtype: Floating type of the weights.
        attention: Attention implementation: sdpa, eager or flash_attention_2.

    Returns:
        The model and its processor.

    Raises:
        OSError: If a part cannot be loaded, from its folder or from the hub.
        ValueError: If the language model's tokenizer has no chat template.
    """
    with _name_source("model.language", language):
        tokenizer = AutoTokenizer.from_pretrained(language, extra_special_tokens={"image_token": IMAGE_PLACEHOLDER})
        decoder = AutoModelForCausalLM.from_pretrained(language, dtype=dtype)
    if not tokenizer.chat_template:
        raise ValueError(
            f"model.language: the tokenizer in '{language}' has no chat template; use an instruction-tuned model"
        )
    with _name_source("model.vision", vision):
        vision_tower = AutoModel.from_pretrained(vision, dtype=dtype)
        image_processor = AutoImageProcessor.from_pretrained(vision)
    vision_tower = getattr(vision_tower, "vision_model", vision_tower)  # the vision half of a model such as CLIP
    decoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    config = LlavaConfig(
        vision_config=vision_tower.config,
        text_config=decoder.config,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER),
        vision_feature_layer=vision_layer,
        tie_word_embeddings=decoder.config.tie_word_embeddings,
    )
    patch_size = vision_tower.config.patch_size
    if grid is not None:
        side = grid * patch_size
        image_processor.size = dict.fromkeys(dict(image_processor.size), side)
        if getattr(image_processor, "crop_size", None):
            image_processor.crop_size = {"height": side, "width": side}
    crop = getattr(image_processor, "crop_size", None) or image_processor.size
    config.image_seq_length = (crop["height"] // patch_size) * (crop["width"] // patch_size)
    model = LlavaForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation=attention)
    model.model.vision_tower.load_state_dict(vision_tower.state_dict())
    model.model.language_model.load_state_dict(decoder.get_decoder().state_dict())
    model.lm_head.load_state_dict(decoder.get_output_embeddings().state_dict())
    model.generation_config = decoder.generation_config
    processor = LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=multimodal_chat_template(tokenizer.chat_template),
    )
    return model, processor


@contextlib.contextmanager
def _name_source(setting: str, name: str) -> Iterator[None]:
    """Name the setting and the model in an OSError: transformers' own names neither when the hub does not answer."""
    try:
        yield
    except OSError as error:
        first_line = str(error).strip().splitlines()[0]
        raise OSError(f"{setting}: '{name}' cannot be loaded: {first_line}") from error
