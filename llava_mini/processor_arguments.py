"""Arguments of a processor's call: those of the tokenizer, by themselves or in transformers' groups."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import PreTrainedTokenizerBase

# Groups of transformers' processors. Images and videos have no further arguments here.
GROUPS = ("text_kwargs", "images_kwargs", "videos_kwargs", "common_kwargs")


def tokenizer_arguments(tokenizer: PreTrainedTokenizerBase, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a tokenizer's call from those of a processor's call.

    Args:
        tokenizer: The processor's tokenizer. It ignores names that it does not know, so they are refused here.
        arguments: Arguments of the processor, some of them perhaps in `text_kwargs` or `common_kwargs`.

    Raises:
        TypeError: If the tokenizer does not know an argument.

    Example:
        >>> from llava_mini.processor_arguments import tokenizer_arguments
        >>> tokenizer_arguments(processor.tokenizer, {"text_kwargs": {"padding": True}, "return_tensors": "pt"})
        {'padding': True, 'return_tensors': 'pt'}
    """
    flat: dict[str, Any] = {}
    for group in GROUPS:
        flat |= arguments.get(group) or {}
    flat |= {name: value for name, value in arguments.items() if name not in GROUPS}
    known = known_arguments(tokenizer)
    for name, value in flat.items():
        if name not in known:
            raise TypeError(
                f"the processor's call takes no {name}={value!r}: the tokenizer does not know it; how images are "
                "prepared is set in processor.image_processor, and tiles in the processor"
            )
    return flat


def known_arguments(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """Return the names of the arguments that a tokenizer's call has beside the text."""
    names = inspect.signature(type(tokenizer).__call__).parameters.keys()
    return frozenset(name for name in names if name not in ("self", "kwargs") and not name.startswith("text"))


def split_template_arguments(
    tokenizer: PreTrainedTokenizerBase, arguments: dict[str, Any], processor_kwargs: dict[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split the arguments of `apply_chat_template` into those of the processor's call and those of the template.

    Args:
        tokenizer: The processor's tokenizer.
        arguments: Arguments of both.
        processor_kwargs: Arguments that are meant for the call.

    Returns:
        Those of the call, and those of the template.

    Raises:
        TypeError: If an option is set that needs the template's own marks of the answers.
    """
    for name in ("return_assistant_tokens_mask", "sanitize_control_tokens"):
        if arguments.get(name):
            raise TypeError(f"LLaVA-Mini takes no {name}; its answer_mask marks the assistant's turns")
    of_call = {"fps", "num_frames", "stream", *known_arguments(tokenizer)}
    call = dict(processor_kwargs or {}) | {name: value for name, value in arguments.items() if name in of_call}
    return call, {name: value for name, value in arguments.items() if name not in of_call}


__all__ = ["split_template_arguments", "tokenizer_arguments"]
