"""The forms in which conversation files are published, brought to the one of LLaVA's training files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.data.bad_entries import EntryError
from experiments.data.samples import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER

_SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}
_PART_MEDIA = {"image": "image", "image_url": "image", "video": "video"}
_PLACEHOLDERS = {"image": IMAGE_PLACEHOLDER, "video": VIDEO_PLACEHOLDER}
_PACKED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"(\xb5/\xfd": "zstd", b"PAR1": "parquet"}


def parse_entries(text: bytes, source: Path) -> list[Any]:
    """Return the entries of a conversation file: a JSON list, or JSON Lines with one object a line.

    Args:
        text: The bytes of the file.
        source: Its path, for messages.

    Raises:
        ValueError: If the file is neither, with the line that is not JSON, or if it holds no entry.
    """
    for start, name in _PACKED.items():
        if text.startswith(start):
            raise ValueError(f"'{source}' is a {name} file; unpack or convert it to JSON")
    stripped = text.removeprefix(b"\xef\xbb\xbf").strip()
    try:
        entries: Any = json.loads(stripped)
    except ValueError as error:
        # JSON Lines are no JSON where they have several lines.
        if not stripped.startswith(b"{") or (source.suffix == ".json" and not str(error).startswith("Extra data")):
            raise ValueError(f"'{source}' is not JSON: {error}") from error
        entries = list(_parse_lines(stripped, source))
    if isinstance(entries, dict) and source.suffix != ".json":
        entries = [entries]  # JSON Lines of one line
    if not isinstance(entries, list) or not entries:
        kind = type(entries).__name__ if entries else "none"
        raise ValueError(
            f"'{source}': expected a list of conversations, or one object a line in a .jsonl, found {kind}"
        )
    return entries


def _parse_lines(text: bytes, source: Path) -> Iterator[Any]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except ValueError as error:
            raise ValueError(f"'{source}', line {number} is not JSON: {error}") from error


def to_llava_form(entry: Any) -> Any:
    """Return an entry with `conversations` of "human" and "gpt" turns, and with "system" where it has a system prompt.

    Accepted are "messages" for "conversations", "role" and "content" for "from" and "value", "user" and "assistant" for
    "human" and "gpt", "images" and "videos" for "image" and "video", and content as a list of parts of type text, image,
    image_url or video. Paths in the parts count if the entry names none. An answer ahead of the first question is left
    out, as the released training code does.

    Args:
        entry: An entry of the file. What is no conversation is returned as it is, for later checks.

    Raises:
        EntryError: If it names its images twice, has a system turn that is not the first, or has two system prompts.

    Example:
        >>> chat = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "a cat"}]
        >>> to_llava_form({"messages": chat})
        {'conversations': [{'from': 'human', 'value': 'what?'}, {'from': 'gpt', 'value': 'a cat'}]}
    """
    if not isinstance(entry, dict):
        return entry
    turns = entry.get("conversations", entry.get("messages"))
    if not isinstance(turns, list):
        return entry
    entry = {key: value for key, value in entry.items() if key != "messages"} | _media_of(entry, turns)
    converted = [_to_llava_turn(turn) for turn in turns]
    speakers = [turn.get("from") if isinstance(turn, dict) else None for turn in converted]
    if speakers[:1] == ["system"]:
        if entry.get("system"):
            raise EntryError('turn 0: a system turn beside the entry\'s "system"; keep one of the two')
        entry["system"] = converted[0]["value"]
        converted, speakers = converted[1:], speakers[1:]
    if "system" in speakers:
        number = len(turns) - len(speakers) + speakers.index("system")
        raise EntryError(f"turn {number}: a system turn after other turns; it must be the first")
    if len(converted) > 2 and speakers[0] == "gpt":
        converted = converted[1:]
    return entry | {"conversations": converted}


def _media_of(entry: dict[str, Any], turns: list[Any]) -> dict[str, Any]:
    """Return "image" and "video" of an entry, whatever it calls them, as far as it has them."""
    media = {}
    for kind in _PLACEHOLDERS:
        given = [name for name in (kind, f"{kind}s") if entry.get(name) is not None]
        if len(given) == 2:
            raise EntryError(f'"{kind}" and "{kind}s" are both given; keep one of the two')
        if given:
            media[kind] = entry[given[0]]
        elif paths := [path for part in _parts(turns, kind) if (path := _part_path(part)) is not None]:
            media[kind] = paths
    return media


def _parts(turns: list[Any], kind: str) -> Iterator[dict[str, Any]]:
    """Yield the parts of messages that are images, or videos."""
    for turn in turns:
        content = turn.get("content", turn.get("value")) if isinstance(turn, dict) else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and _PART_MEDIA.get(str(part.get("type"))) == kind:
                yield part


def _part_path(part: dict[str, Any]) -> Any:
    """Return the path in a part of a message, None for a part that is a placeholder alone."""
    given = next((part[name] for name in (part["type"], "path", "url") if part.get(name) is not None), None)
    return given.get("url") if isinstance(given, dict) else given


def _to_llava_turn(turn: Any) -> Any:
    if not isinstance(turn, dict):
        return turn
    speaker, value = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        # as LLaVA's files have it: a placeholder stands on a line of its own
        kinds = [_PART_MEDIA.get(str(part.get("type"))) for part in value]
        texts = [_PLACEHOLDERS[kind] if kind else part.get("text") for kind, part in zip(kinds, value, strict=True)]
        value = "\n".join(map(str, texts)) if None not in texts else value
    return {"from": _SPEAKERS.get(str(speaker), speaker), "value": value}
