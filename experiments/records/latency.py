"""How long models take over a question, as `python -m experiments.benchmarks.prefill_latency` measured it, beside the records of what
they answer."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.config.identity import INCIDENTAL

FILE = "latency.json"
# what says how a model came by its weights, or where it ran, and not what it computes
_NOT_TIMED = ("seed", "train", "probe", "bench", "cost", *INCIDENTAL)


def timed_part(config: Mapping[str, Any]) -> str:
    """What a record's resolved configuration says of the time that a question takes; equal texts take equally long."""
    return json.dumps({key: value for key, value in config.items() if key not in _NOT_TIMED}, sort_keys=True)


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """By `timed_part`, what records get into their `cost`: `latency`, the median in seconds, and `latency_note`. Empty
    where the results folder holds no measurement.

    Raises:
        ValueError: If there is a file and it is none of these.
    """
    path = folder / FILE
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        note = (
            f"median of {found['repeats']} rounds in which all models took turns, {found['machine']}; one question with "
            "its answer"
        )
        return {
            timed_part(row["config"]): {"latency": statistics.median(row["seconds"]), "latency_note": note}
            for row in found["rows"]
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no whole measurement of latency ({error}): delete it or measure again with "
            f"`python -m experiments.benchmarks.prefill_latency --results {folder}`"
        ) from None
