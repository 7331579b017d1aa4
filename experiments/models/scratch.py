"""The tiny LLaVA from nothing: tokenizer, processor and a model of about two million parameters."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from experiments.data.samples import IMAGE_SLOT, Sample

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
HEAD_DIM = 64
ROPE_THETA = 1e6
ROLES = ("<user>", "<assistant>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<' + message['role'] + '>' }}"
    "{% for part in message['content'] %}{{ '<' + part['type'] + '>' if part['type'] in ('image', 'video') else part['text'] }}{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer(samples: Iterable[Sample], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on questions and answers; it can write any other text byte by byte."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[*SPECIAL.values(), IMAGE_SLOT, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((text for s in samples for text in (*s.questions, *s.answers)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        **SPECIAL,
        extra_special_tokens={"image_token": IMAGE_SLOT},
        additional_special_tokens=list(ROLES),
        padding_side="left",
    )


def processor(text: PreTrainedTokenizerFast, side: int, patch: int) -> LlavaProcessor:
    pixels = CLIPImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=[0.5] * 3,
        image_std=[0.25] * 3,
    )
    return LlavaProcessor(
        pixels,
        text,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which the strategy drops again
        chat_template=CHAT_TEMPLATE,
    )


def llava(
    text: PreTrainedTokenizerFast, side: int, patch: int, width: int, layers: int
) -> LlavaForConditionalGeneration:
    """transformers' own LLaVA with a small CLIP tower and a small Llama (grouped-query heads), freshly initialised."""
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=side,
        patch_size=patch,
        projection_dim=96,
    )
    language = LlamaConfig(
        vocab_size=len(text),
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        # so few dimensions turn fast that most are left to match content over a whole conversation
        head_dim=HEAD_DIM,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=language,
        image_token_id=text.convert_tokens_to_ids(IMAGE_SLOT),
        vision_feature_layer=-1,
        image_seq_length=(side // patch) ** 2,
        tie_word_embeddings=True,
        pad_token_id=text.pad_token_id,
    )
    return LlavaForConditionalGeneration(config)
