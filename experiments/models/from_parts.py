"""A LLaVA from a vision directory and a language directory, with a projector that has learned nothing yet."""

from __future__ import annotations

import torch
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from experiments.data.samples import IMAGE_SLOT

# Turns message parts into plain strings, each picture into its slot and a new line, for the text template that follows.
_FLATTEN = (
    "{%- set flat = namespace(messages=[]) -%}{%- for message in messages -%}"
    "{%- set content -%}{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{{ '<' + part['type'] + '>\n' if part['type'] in ('image', 'video') else part['text'] }}{%- endfor -%}"
    "{%- endif -%}{%- endset -%}"
    "{%- set flat.messages = flat.messages + [{'role': message['role'], 'content': content}] -%}{%- endfor -%}"
    "{%- set messages = flat.messages -%}"
)


def image_chat_template(text_template: str) -> str:
    """A language model's own chat template, made to take messages with images."""
    return _FLATTEN + text_template


def join(
    vision: str, language: str, vision_layer: int, grid: int | None, dtype: torch.dtype, attention: str
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Join any Auto vision model that returns patch features after one class token with any Auto decoder.

    The projector (and the embedding of the image token) is drawn from torch's current seed.

    Args:
        vision_layer: The hidden states of the tower that are taken; -2 is the last layer but one.
        grid: Patches a side that pictures are scaled to have, by default those that the tower's processor says. A tower
            whose positions do not stretch refuses any other.

    Raises:
        ValueError: if the language model's tokenizer has no chat template.
    """
    tokenizer = AutoTokenizer.from_pretrained(language, extra_special_tokens={"image_token": IMAGE_SLOT})
    if not tokenizer.chat_template:
        raise ValueError(
            f"model.language: the tokenizer in '{language}' has no chat template; use an instruction-tuned model"
        )
    tower = AutoModel.from_pretrained(vision, dtype=dtype)
    tower = getattr(tower, "vision_model", tower)  # of a two-tower model such as CLIP, the half that sees
    decoder = AutoModelForCausalLM.from_pretrained(language, dtype=dtype)
    decoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=decoder.config,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_SLOT),
        vision_feature_layer=vision_layer,
        tie_word_embeddings=decoder.config.tie_word_embeddings,
    )
    pixels = AutoImageProcessor.from_pretrained(vision)
    if grid is not None:
        side = grid * tower.config.patch_size
        pixels.size = dict.fromkeys(dict(pixels.size), side)
        if getattr(pixels, "crop_size", None):
            pixels.crop_size = {"height": side, "width": side}
    crop = getattr(pixels, "crop_size", None) or pixels.size
    config.image_seq_length = (crop["height"] // tower.config.patch_size) * (crop["width"] // tower.config.patch_size)
    model = LlavaForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation=attention)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(decoder.get_decoder().state_dict())
    model.lm_head.load_state_dict(decoder.get_output_embeddings().state_dict())
    model.generation_config = decoder.generation_config
    processor = LlavaProcessor(
        pixels,
        tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=image_chat_template(tokenizer.chat_template),
    )
    return model, processor
