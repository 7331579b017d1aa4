"""Files of answers: one task's result and, line by line, the answers and scores of its documents.

The first line holds the result with a key and a hash of the other lines. The key names everything that the answers depend
on, so an interrupted cell takes up the tasks that it has finished, and other weights never get old answers.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.files import write_atomically
from experiments.records.benchmarks import ANSWERS_FOLDER

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def answer_file(task: str, key: Mapping[str, Any]) -> Path:
    """Return the path of a task's file inside a results folder.

    Args:
        task: Name of the task or group.
        key: What its answers depend on, as JSON values.

    Example:
        >>> answer_file("pope", {"weights": "90ab"}).name
        'pope-847a10b2cd5f3d86.jsonl'
    """
    return Path(ANSWERS_FOLDER) / f"{task}-{digest(key)[:16]}.jsonl"


def write_answers(path: Path, key: Mapping[str, Any], result: Mapping[str, Any], lines: Iterable[Any]) -> None:
    """Write a task's file whole, or not at all.

    Args:
        path: The file.
        key: What the answers depend on.
        result: The scores and what else the record holds of the task.
        lines: One entry a document.

    Raises:
        OSError: If it cannot be written.
    """
    body = "".join(f"{_json(line)}\n" for line in lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, f"{_json({'key': key, 'result': result, 'lines_sha256': _sha256(body)})}\n{body}")


def read_result(path: Path, key: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the result that a file holds, None if it is missing, has another key, or has changed since it was written.

    Args:
        path: The file.
        key: What the answers must depend on.
    """
    try:
        first, _, body = path.read_text(encoding="utf-8").partition("\n")
        header = json.loads(first)
        if header["key"] != json.loads(_json(key)) or header["lines_sha256"] != _sha256(body):
            return None
        return header["result"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def document_line(task: str, entry: Mapping[str, Any], metrics: Iterable[str]) -> dict[str, Any]:
    """Return the line of one document.

    Args:
        task: Its task, one of a group's.
        entry: What lmms-eval logs of it.
        metrics: The metrics of the task.

    Example:
        >>> entry = {"doc_id": 3, "arguments": ["Is it red?"], "target": "no", "filtered_resps": ["No"], "exact_match": 1.0}
        >>> document_line("gqa", entry, ["exact_match"])["scores"]
        {'exact_match': 1.0}
    """
    texts = [argument for argument in entry["arguments"] if isinstance(argument, str)]
    return {
        "task": task,
        "doc_id": entry["doc_id"],
        "prompt": texts[0] if texts else "",
        "answer": entry["filtered_resps"][0] if len(entry["filtered_resps"]) == 1 else entry["filtered_resps"],
        "target": entry["target"],
        "scores": {name: entry[name] for name in metrics if name in entry},
    }


def digest(value: Any) -> str:
    """Return a SHA-256 hash of values that JSON can hold, and of others by their text. Addresses of functions do not count."""
    return _sha256(_ADDRESS.sub("", _json(value)))


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=_plain)


def _plain(value: Any) -> Any:
    """Return numpy's and torch's numbers as numbers, and anything else as text."""
    return value.item() if hasattr(value, "item") and getattr(value, "size", 1) == 1 else str(value)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
