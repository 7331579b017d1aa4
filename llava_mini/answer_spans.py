"""Where the assistant's answers are: spans of characters in a rendered chat, and the mask of their tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

# Start and end of spans of characters.
CharacterSpans = Sequence[tuple[int, int]]
# Options of `apply_chat_template` that say how the text ends.
END_OPTIONS = ("add_generation_prompt", "continue_final_message")


def find_answer_spans(
    chat: list[dict[str, Any]], text: str, render: Callable[..., str], variables: dict[str, Any]
) -> CharacterSpans:
    """Locate the assistant's turns in a rendered chat, each from after its generation prompt to its end.

    Args:
        chat: Messages of the chat.
        text: The rendered chat.
        render: Function that renders messages with the same chat template.
        variables: What the chat was rendered with: variables of the template and the options of its end.

    Raises:
        ValueError: If the template does not render the chat turn by turn.
    """
    spans = []
    shared = {name: value for name, value in variables.items() if name not in END_OPTIONS}
    for i, message in enumerate(chat):
        if message["role"] != "assistant":
            continue
        # Many templates read the first message, so that an empty chat cannot be rendered.
        prompt = render(chat[:i], add_generation_prompt=True, **shared) if i else ""
        is_open = variables.get("continue_final_message", False) and i == len(chat) - 1
        with_answer = text if is_open else render(chat[: i + 1], **shared).rstrip()
        if not (with_answer.startswith(prompt) and text.startswith(with_answer)):
            raise ValueError("the chat template does not render the chat turn by turn: set fuse_answers=True")
        spans.append((len(prompt), len(with_answer)))
    return spans


def shift_spans(spans: CharacterSpans, insertions: list[tuple[int, int]]) -> CharacterSpans:
    """Shift character spans by the text inserted ahead of their ends.

    Args:
        spans: Spans in the text before the insertions.
        insertions: Position of each insertion in that text, and the number of characters that it adds.
    """

    def shift(position: int) -> int:
        return position + sum(added for end, added in insertions if end <= position)

    return [(shift(start), shift(end)) for start, end in spans]


def tokens_within(spans: CharacterSpans, offsets: Iterable[Sequence[int]]) -> list[bool]:
    """Return for each token whether its characters lie within a span; a token without characters does not.

    Args:
        spans: Spans of characters of a text.
        offsets: First and last character of each token, as a tokenizer's `offset_mapping`.
    """
    return [any(first <= start < end <= last for first, last in spans) for start, end in map(tuple, offsets)]


__all__ = ["CharacterSpans", "find_answer_spans", "shift_spans", "tokens_within"]
