"""Generation options of lmms-eval's tasks, as arguments of transformers' `generate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

DEFAULT_NEW_TOKENS = 1024  # as lmms-eval's own LLaVA, for tasks that name no number
_PADS_IMAGES = "image_aspect_ratio"  # of LLaVA's released code; here the processor decides
_ADDED_STOP = "\n\n"
_SAMPLING = ("temperature", "top_p", "top_k")


def generate_arguments(options: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Convert a task's `generation_kwargs` to arguments of `generate`, and its stop strings.

    A temperature of 0 means greedy decoding. The stop string of an empty line is left out: lmms-eval adds it to every
    task that names none, and it would cut long answers after their first paragraph (as in lmms-eval's Qwen2-VL).

    Args:
        options: The task's options. Unknown ones go to `generate`, which refuses them.

    Returns:
        Arguments of `generate`, and the texts that end an answer.

    Raises:
        ValueError: If `until` is not a text or a list of texts.

    Example:
        >>> generate_arguments({"until": ["ASSISTANT:", "\\n\\n"], "temperature": 0, "top_p": 1.0, "num_beams": 2})
        ({'max_new_tokens': 1024, 'do_sample': False, 'num_beams': 2}, ['ASSISTANT:'])
    """
    arguments = {"max_new_tokens": DEFAULT_NEW_TOKENS, "do_sample": False, **options}
    arguments.pop(_PADS_IMAGES, None)
    until = arguments.pop("until", None) or []
    until = [until] if isinstance(until, str) else until
    if not isinstance(until, list) or not all(isinstance(text, str) for text in until):
        raise ValueError(f"generation_kwargs.until: must be a text or a list of texts, found {until!r}")
    if "do_sample" not in options:
        arguments["do_sample"] = float(options.get("temperature") or 0) > 0
    if not arguments["do_sample"]:
        for name in _SAMPLING:
            arguments.pop(name, None)
    return arguments, [text for text in until if text and text != _ADDED_STOP]


def cut_at_stops(text: str, stops: Sequence[str]) -> str:
    """Return the text before the first stop string, without spaces around it.

    Example:
        >>> cut_at_stops(" a red ring ASSISTANT: yes", ["ASSISTANT:"])
        'a red ring'
    """
    for stop in stops:
        text = text.split(stop)[0]
    return text.strip()
