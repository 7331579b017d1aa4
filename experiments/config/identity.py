"""Settings that say where a cell ran, where it wrote and for which table: they do not change what it finds."""

from __future__ import annotations

import hashlib
import json
from typing import Any

INCIDENTAL = ("name", "device", "threads", "results", "save", "batch_size")


def identity(config: dict[str, Any], data: str, code: str) -> str:
    """16 hex digits that name a cell: its resolved configuration, its data and the code that ran it."""
    kept = {key: value for key, value in config.items() if key not in INCIDENTAL}
    return hashlib.sha256(json.dumps([kept, data, code], sort_keys=True).encode()).hexdigest()[:16]
