"""The forms in which conversation files are published, brought to the one of LLaVA's training files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from experiments.data.samples import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER

_SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}
_PART_PLACEHOLDERS = {"image": IMAGE_PLACEHOLDER, "image_url": IMAGE_PLACEHOLDER, "video": VIDEO_PLACEHOLDER}


def parse_entries(text: bytes, source: Path) -> list[Any]:
    """Return the entries of a conversation file: a JSON list, or JSON Lines with one object a line.

    Args:
        text: The bytes of the file.
        source: Its path, for messages.

    Raises:
        ValueError: If the file is neither, with the line that is not JSON, or if it holds no entry.
    """
    stripped = text.removeprefix(b"\xef\xbb\xbf").strip()
    if stripped.startswith(b"{") and source.suffix != ".json":
        entries: Any = []
        for number, line in enumerate(stripped.splitlines(), 1):
            if not line.strip():
                continue
            try:
                entries.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"'{source}', line {number} is not JSON: {error}") from error
    else:
        try:
            entries = json.loads(stripped)
        except ValueError as error:
            raise ValueError(f"'{source}' is not JSON: {error}") from error
    if not isinstance(entries, list) or not entries:
        kind = type(entries).__name__ if entries else "none"
        raise ValueError(
            f"'{source}': expected a list of conversations, or one object a line in a .jsonl, found {kind}"
        )
    return entries


def to_llava_form(entry: Any, where: str) -> Any:
    """Return an entry with `conversations` of "human" and "gpt" turns.

    Accepted are "messages" for "conversations", "role" and "content" for "from" and "value", "user" and "assistant" for
    "human" and "gpt", and content as a list of parts of type text, image, image_url or video. An answer ahead of the first
    question is left out, as the released training code does.

    Args:
        entry: An entry of the file. What is no conversation is returned as it is, for later checks.
        where: The file and the entry, for messages.

    Raises:
        ValueError: If a turn is of a system prompt, which the chat template has to hold.
    """
    if not isinstance(entry, dict):
        return entry
    turns = entry.get("conversations", entry.get("messages"))
    if not isinstance(turns, list):
        return entry
    converted = [_to_llava_turn(turn) for turn in turns]
    for number, turn in enumerate(converted):
        if isinstance(turn, dict) and turn.get("from") == "system":
            raise ValueError(
                f"{where}, turn {number}: a system turn; put its text into the chat template, or into the first question"
            )
    if len(converted) > 2 and isinstance(converted[0], dict) and converted[0].get("from") == "gpt":
        converted = converted[1:]
    return {key: value for key, value in entry.items() if key != "messages"} | {"conversations": converted}


def _to_llava_turn(turn: Any) -> Any:
    if not isinstance(turn, dict):
        return turn
    speaker, value = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        # as LLaVA's files have it: a placeholder stands on a line of its own
        texts = [_PART_PLACEHOLDERS.get(str(part.get("type")), part.get("text")) for part in value]
        value = "\n".join(map(str, texts)) if None not in texts else value
    return {"from": _SPEAKERS.get(str(speaker), speaker), "value": value}
