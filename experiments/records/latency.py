"""Prefill latencies that `python -m experiments.benchmarks.prefill_latency` measured, for the records of the same models."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.config.identity import IGNORED_SETTINGS
from experiments.config.renamed_keys import migrate

FILE = "latency.json"
# Settings that change a model's weights or where it ran, and not what it computes.
_WITHOUT_EFFECT = ("seed", "train", "probe", "bench", "cost", *IGNORED_SETTINGS)


def latency_key(config: Mapping[str, Any]) -> str:
    """Return a text that is equal for configurations whose models take equally long.

    Args:
        config: A record's configuration.
    """
    return json.dumps({key: value for key, value in config.items() if key not in _WITHOUT_EFFECT}, sort_keys=True)


def load_latencies(folder: Path) -> dict[str, dict[str, Any]]:
    """Read the latencies of a results folder.

    Returns:
        By `latency_key`, the entries for a record's `cost`: `latency`, the median in seconds, and `latency_note`. Empty
        if nothing was measured.

    Raises:
        ValueError: If the file is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return {}
    try:
        measured = json.loads(path.read_text(encoding="utf-8"))
        note = (
            f"median of {measured['repeats']} rounds in which all models took turns, {measured['machine']}; one question "
            "with its answer"
        )
        return {
            latency_key(migrate(row["config"])): {"latency": statistics.median(row["seconds"]), "latency_note": note}
            for row in measured["rows"]
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: not a whole measurement ({error}); delete it, or measure again with "
            f"`python -m experiments.benchmarks.prefill_latency --results {folder}`"
        ) from None
