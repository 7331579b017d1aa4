"""The part of a record that a figure draws."""

from __future__ import annotations

from typing import Any

from experiments.records.views import Record


def require_part(record: Record, part: str, name: str) -> Any:
    """Return a part of a record.

    Args:
        record: The record.
        part: Key of the part: "removal".
        name: What the part holds, for the error.

    Raises:
        ValueError: If the record does not hold it.

    Example:
        >>> require_part({"id": "1f", "swaps": {"properties": {}}}, "swaps", "swaps")
        {'properties': {}}
    """
    value = record.get(part)
    if value is None:
        raise ValueError(f"record {record['id']} holds no {name} to draw")
    return value
