"""Contents of chat messages: their images and videos, and the character spans of the assistant's answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from transformers.image_utils import load_image

# Start and end of spans of characters.
CharacterSpans = Sequence[tuple[int, int]]


def message_parts(chats: list[list[dict[str, Any]]], kind: str) -> Iterator[dict[str, Any]]:
    """Iterate over the message parts of type `kind` ("image" or "video") of all chats, in order."""
    for chat in chats:
        for message in chat:
            if not isinstance(message["content"], str):
                yield from (part for part in message["content"] if part["type"] == kind)


def part_source(part: dict[str, Any]) -> Any:
    """Return the image or video of a message part: an object, a path, an address or base64.

    Raises:
        ValueError: If the part has none.
    """
    for name in (part["type"], "url", "path", "base64"):
        if part.get(name) is not None:
            return part[name]
    raise ValueError(
        f"a message part of type {part['type']!r} has no {part['type']}: give it as {part['type']!r}, 'url', 'path' or "
        "'base64'"
    )


def load_part_image(part: dict[str, Any], ignore_orientation: bool) -> Any:
    """Return the image of a message part. Addresses and base64 are loaded here, as transformers does; paths are not.

    Raises:
        ValueError: If `ignore_orientation` is set for an address or base64, which transformers turns upright.
    """
    source = part_source(part)
    is_remote = isinstance(source, str) and source.startswith(("http://", "https://", "data:image/"))
    if not (is_remote or "base64" in part):
        return source
    if ignore_orientation:
        raise ValueError(
            f"ignore_orientation=True needs images as files or PIL images, because transformers turns others upright; "
            f"got {source[:40]!r}"
        )
    return load_image(source)


def check_text(text: Any, where: str) -> None:
    """Check that a text can be tokenized.

    A surrogate is half of a character. Strings have lone ones after a faulty decoding, for example of bytes that are not
    UTF-8 on the command line.

    Args:
        text: The text. Other values than strings are not checked.
        where: What the text is, for the error.

    Raises:
        ValueError: If the text has a surrogate.
    """
    try:
        str(text).encode()
    except UnicodeEncodeError as error:
        character = ord(str(text)[error.start])
        raise ValueError(
            f"{where} has the surrogate U+{character:04X} at character {error.start} (counted from 0), which is no text: "
            "decode it from valid UTF-8, or remove it"
        ) from error


def check_message_texts(chats: list[list[dict[str, Any]]]) -> None:
    """Check the texts of all messages.

    Raises:
        ValueError: As [`check_text`]. It names the message, and the part if its content is a list.
    """
    for row, chat in enumerate(chats):
        for index, message in enumerate(chat):
            where = f"message {index}" + (f" of chat {row}" if len(chats) > 1 else "")
            if isinstance(message.get("content"), list):
                for i, part in enumerate(message["content"]):
                    if isinstance(part, dict) and isinstance(part.get("text"), str):
                        check_text(part["text"], f"{where}, part {i},")
            elif isinstance(message.get("content"), str):
                check_text(message["content"], where)


def find_answer_spans(chat: list[dict[str, Any]], text: str, render: Callable[..., str]) -> CharacterSpans:
    """Locate the assistant's turns in a rendered chat, each from after its generation prompt to its end.

    Args:
        chat: Messages of the chat.
        text: The rendered chat.
        render: Function that renders messages with the same chat template.

    Raises:
        ValueError: If the template does not render the chat turn by turn.
    """
    spans = []
    for i, message in enumerate(chat):
        if message["role"] == "assistant":
            prompt, with_answer = render(chat[:i], add_generation_prompt=True), render(chat[: i + 1])
            if not (with_answer.startswith(prompt) and text.startswith(with_answer.rstrip())):
                raise ValueError("the chat template does not render the chat turn by turn: set fuse_answers=True")
            spans.append((len(prompt), len(with_answer.rstrip())))
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


__all__ = [
    "CharacterSpans",
    "check_message_texts",
    "check_text",
    "find_answer_spans",
    "load_part_image",
    "message_parts",
    "part_source",
    "shift_spans",
]
