"""The identity of a cell: a hash of its settings, its data and the code that it depends on."""

from __future__ import annotations

import hashlib
import json
from typing import Any

IGNORED_SETTINGS = ("name", "device", "threads", "results", "save", "batch_size")
"""Settings that leave a cell's result as it is: where it ran, where it wrote, and for which table."""


def cell_identity(config: dict[str, Any], data: str, code: str) -> str:
    """Return the identity of a cell.

    Args:
        config: The resolved configuration as plain containers.
        data: The fingerprint of its data.
        code: The version of the code, from `experiments.provenance.code_version`.

    Returns:
        16 hex digits.
    """
    relevant = {key: value for key, value in config.items() if key not in IGNORED_SETTINGS}
    return hashlib.sha256(json.dumps([relevant, data, code], sort_keys=True).encode()).hexdigest()[:16]
