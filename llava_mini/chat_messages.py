"""Contents of chat messages: their texts, images and videos."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers.image_utils import load_image

# How an image that transformers loads starts.
REMOTE = ("http://", "https://", "data:")


def message_parts(chats: list[list[dict[str, Any]]], kind: str) -> Iterator[dict[str, Any]]:
    """Iterate over the message parts of type `kind` ("image" or "video") or `kind`_url of all chats, in order."""
    for chat in chats:
        for message in chat:
            if not isinstance(message["content"], str):
                yield from (part for part in message["content"] if part["type"] in (kind, f"{kind}_url"))


def part_source(part: dict[str, Any]) -> Any:
    """Return the image or video of a message part: an object, a path, an address or base64.

    Raises:
        ValueError: If the part has none, or a video is not given as a file or as frames.
    """
    for name in (part["type"], "url", "path", "base64"):
        if (source := part.get(name)) is None:
            continue
        if isinstance(source, dict):  # {"type": "image_url", "image_url": {"url": ...}}, as OpenAI writes it
            source = source["url"]
        is_remote = name == "base64" or (isinstance(source, str) and source.startswith(REMOTE))
        if part["type"].startswith("video") and is_remote:
            raise ValueError(f"videos are read from files, not from addresses or base64; got {source[:40]!r}")
        return source
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
    is_remote = isinstance(source, str) and source.startswith(REMOTE)
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


__all__ = [
    "check_message_texts",
    "check_text",
    "load_part_image",
    "message_parts",
    "part_source",
]
