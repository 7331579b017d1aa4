"""Chat templates of converted checkpoints, against the conversations of the official code."""

from __future__ import annotations

import hashlib

import pytest
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split, WhitespaceSplit

from llava_mini.chat_templates import LLAMA_3_TEMPLATE, VICUNA_TEMPLATE

LLAMA_3_WORDS = [
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|finetune_right_pad_id|>",
]
VICUNA_WORDS = ["<unk>", "<s>", "</s>"]
CHAT = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "Why?"},
]


@pytest.fixture
def render(bare_tokenizer):
    def rendered(template, special, chat=CHAT, **options):
        tokenizer = bare_tokenizer(special, WhitespaceSplit())
        return tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False, **options)

    return rendered


def test_llama_3_template_renders_the_official_conversation(render):
    text = render(LLAMA_3_TEMPLATE, LLAMA_3_WORDS)
    head = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    system, *turns = text.removeprefix(head).split("<|eot_id|>")
    assert text.startswith(head)
    assert hashlib.sha256(system.encode()).hexdigest().startswith("790f4cfc05523b0e")  # hash of the official sentence
    assert turns == [
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat is this?",
        "<|start_header_id|>assistant<|end_header_id|>\n\nA cat.",
        "<|start_header_id|>user<|end_header_id|>\n\nWhy?",
        "",
    ]
    prompt = render(LLAMA_3_TEMPLATE, LLAMA_3_WORDS, add_generation_prompt=True)
    assert prompt == text + "<|start_header_id|>assistant<|end_header_id|>\n\n"


def test_vicuna_template_renders_the_official_conversation(render):
    assert render(VICUNA_TEMPLATE, VICUNA_WORDS, add_generation_prompt=True) == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\nWhat is this? ASSISTANT: A cat.</s>"
        "USER: Why? ASSISTANT:"
    )


@pytest.mark.parametrize(
    ("template", "special", "answer"),
    [(LLAMA_3_TEMPLATE, LLAMA_3_WORDS, "A cat.<|eot_id|>"), (VICUNA_TEMPLATE, VICUNA_WORDS, " A cat.</s>")],
)
def test_assistant_mask_covers_the_answer_and_its_end_token(bare_tokenizer, render, template, special, answer):
    characters = [*special, *sorted(set(render(template, special)))]
    tokenizer = bare_tokenizer(characters, Split(Regex("."), "isolated"))
    data = tokenizer.apply_chat_template(
        CHAT, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    answer_ids = [i for i, is_answer in zip(data["input_ids"], data["assistant_masks"], strict=True) if is_answer]
    assert "".join(characters[i] for i in answer_ids) == answer


@pytest.mark.parametrize(("template", "special"), [(LLAMA_3_TEMPLATE, LLAMA_3_WORDS), (VICUNA_TEMPLATE, VICUNA_WORDS)])
def test_template_with_a_system_message_omits_the_default(render, template, special):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "video"}]}]
    text = render(template, special, chat)
    assert text.count("Be brief.") == 1
    assert "<video>" in text
    assert "helpful" not in text
