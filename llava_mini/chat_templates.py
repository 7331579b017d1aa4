"""Chat templates of the two language model families that LLaVA-Mini was trained with: Llama 3 and Vicuna."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

# Renders one message. Its content is a string or a list of parts; images and videos become `<image>` and `<video>`.
_CONTENT = (
    "{%- macro show(content) -%}{%- if content is string -%}{{ content }}{%- else -%}{%- for part in content -%}"
    "{%- if part['type'] in ('image', 'video') -%}{{ '<' + part['type'] + '>\\n' }}"
    "{%- else -%}{{ part['text'] }}{%- endif -%}{%- endfor -%}{%- endif -%}{%- endmacro -%}"
)
# The conversation `llava_llama_3_1` of the official code, in the chat format of Llama 3's tokenizer.
LLAMA_3_TEMPLATE = (
    _CONTENT
    + "{%- macro header(role) -%}{{ '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}{%- endmacro -%}"
    "{{ bos_token }}"
    "{%- if messages[0]['role'] != 'system' -%}{{ header('system') + 'You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, and assist the user with a variety of tasks "
    "using natural language.<|eot_id|>' }}{%- endif -%}"
    "{%- for message in messages -%}{{ header(message['role']) }}{%- if message['role'] == 'assistant' -%}"
    "{% generation %}{{ show(message['content']) | trim + '<|eot_id|>' }}{% endgeneration %}"
    "{%- else -%}{{ show(message['content']) | trim + '<|eot_id|>' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ header('assistant') }}{%- endif -%}"
)
# The conversation `vicuna_v1` of LLaVA, without the start token, because the tokenizer adds it. If the text held the
# start token, Llama 2's tokenizer would omit the space ahead of the next word.
VICUNA_TEMPLATE = (
    _CONTENT
    + "{%- if messages[0]['role'] != 'system' -%}{{ 'A chat between a curious user and an artificial intelligence "
    "assistant. The assistant gives helpful, detailed, and polite answers to the user\\'s questions. ' }}{%- endif -%}"
    "{%- for message in messages -%}{%- if message['role'] == 'system' -%}{{ show(message['content']) + ' ' }}"
    "{%- elif message['role'] == 'user' -%}{{ 'USER: ' + show(message['content']) + ' ' }}"
    "{%- else -%}{{ 'ASSISTANT:' }}{% generation %}{{ ' ' + show(message['content']) + eos_token }}{% endgeneration %}"
    "{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
)


def starts_with_bos(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Return whether a rendered chat starts with the start token.

    Some templates write that token and some leave it to the tokenizer. Pass `add_special_tokens=False` where this is
    true, so that a prompt does not get two.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer that will encode the text. It may have no start token.
        text (`str`):
            The chat as its template writes it.

    Returns:
        `bool`: Whether the template wrote the start token.

    Example:
        >>> from llava_mini.chat_templates import starts_with_bos
        >>> starts_with_bos(processor.tokenizer, "what is this")
        False
    """
    return bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)


__all__ = ["LLAMA_3_TEMPLATE", "VICUNA_TEMPLATE", "starts_with_bos"]
