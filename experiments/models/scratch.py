"""The tiny LLaVA with random weights: tokenizer, processor and a model of about two million parameters."""

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

from experiments.data.samples import IMAGE_PLACEHOLDER, Sample

SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
ROLE_TOKENS = ("<user>", "<assistant>")
HEAD_DIM = 64
ROPE_THETA = 1e6
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<' + message['role'] + '>' }}"
    "{% for part in message['content'] %}{{ '<' + part['type'] + '>' if part['type'] in ('image', 'video') else part['text'] }}{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def train_tokenizer(samples: Iterable[Sample], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on questions and answers. It can write any other text byte by byte.

    Args:
        samples: The samples whose questions and answers are the training text.
        vocabulary: Tokens of the vocabulary, at most.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[*SPECIAL_TOKENS.values(), IMAGE_PLACEHOLDER, *ROLE_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((text for s in samples for text in (*s.questions, *s.answers)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        **SPECIAL_TOKENS,
        extra_special_tokens={"image_token": IMAGE_PLACEHOLDER},
        additional_special_tokens=list(ROLE_TOKENS),
        padding_side="left",
    )


def build_processor(tokenizer: PreTrainedTokenizerFast, image_size: int, patch: int) -> LlavaProcessor:
    """Build the processor of a tiny LLaVA.

    Args:
        tokenizer: The tokenizer.
        image_size: Pixels per side of an image.
        patch: Pixels per side of a patch.
    """
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        image_mean=[0.5] * 3,
        image_std=[0.25] * 3,
    )
    return LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which the strategy drops again
        chat_template=CHAT_TEMPLATE,
    )


def build_llava(
    tokenizer: PreTrainedTokenizerFast, image_size: int, patch: int, width: int, layers: int
) -> LlavaForConditionalGeneration:
    """Build transformers' own LLaVA with a small CLIP vision tower and a small Llama (grouped-query heads).

    The weights are drawn from torch's current seed.

    Args:
        tokenizer: The tokenizer.
        image_size: Pixels per side of an image.
        patch: Pixels per side of a patch.
        width: Width of the language model's hidden states.
        layers: Layers of the language model.
    """
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=patch,
        projection_dim=96,
    )
    language = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        # Few of these dimensions rotate fast, so most are left to match content over a whole conversation.
        head_dim=HEAD_DIM,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=language,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER),
        vision_feature_layer=-1,
        image_seq_length=(image_size // patch) ** 2,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlavaForConditionalGeneration(config)
