"""Entries of a conversation file that cannot be used: why, and the list that a results folder keeps of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from experiments.files import write_atomically

FOLDER = "skipped"  # in the results folder


class EntryError(ValueError):
    """What is wrong with an entry, without its file and number.

    Args:
        reason: What is wrong, and what would be right.
        path: The image or video that is wrong, as the entry has it; None if the entry itself is.
    """

    def __init__(self, reason: str, path: str | None = None) -> None:
        super().__init__(reason)
        self.path = path


@dataclass(frozen=True)
class BadEntry:
    """An entry that cannot be used.

    Args:
        file: The conversation file.
        entry: Number of the entry in it, counted from 0.
        id: The entry's own "id", as text; None if it has none.
        path: The image or video that is wrong, as the entry has it; None if the entry itself is.
        reason: What is wrong.
    """

    file: str
    entry: int
    id: str | None
    path: str | None
    reason: str

    def __str__(self) -> str:
        return f"{entry_name(self.file, self.entry, self.id)}: {self.reason}"


def entry_name(file: object, entry: int, id: str | None) -> str:
    """Return how messages name an entry.

    Example:
        >>> entry_name("train.json", 3, "000012")
        "'train.json', entry 3 (id 000012)"
    """
    return f"'{file}', entry {entry}" + (f" (id {id})" if id is not None else "")


def write_bad_entries(entries: Iterable[tuple[str, BadEntry]], results: Path, fingerprint: str) -> str:
    """Write the entries that a data set leaves out, one JSON object a line.

    Args:
        entries: The name of the split and the entry, for each.
        results: The results folder.
        fingerprint: The data set's, which names the file.

    Returns:
        Path of the file inside the results folder.

    Raises:
        OSError: If it cannot be written.
    """
    path = results / FOLDER / f"{fingerprint}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"split": split, **asdict(entry)}) for split, entry in entries]
    write_atomically(path, "".join(f"{line}\n" for line in lines))
    return str(path.relative_to(results))
