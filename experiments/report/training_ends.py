"""How the training of rows ended: at a plateau, while still improving, or after a fixed length."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from experiments.records.views import Record
from experiments.report.run_groups import RunGroup

TRAINING_COLUMN = "Trained until"
STILL_IMPROVING = "still improving"


def trains_until_plateau(record: Record) -> bool:
    """Return whether a record's training was to end at a plateau of its validation loss (`train.until`)."""
    return (record["config"].get("train") or {}).get("until") == "plateau"


def is_still_improving(record: Record) -> bool:
    """Return whether training was to end at a plateau, and reached its greatest length before."""
    return trains_until_plateau(record) and (record.get("train") or {}).get("stopped") == "max_steps"


def training_notes(records: Sequence[Record], consequence: str) -> list[str]:
    """Return the note of a table on how training ended; none if no training was to end at a plateau.

    Args:
        records: Finished records of the table.
        consequence: What the table does with a row that was still improving.
    """
    if not any(map(trains_until_plateau, records)):
        return []
    return [
        f"{describe_training(records)} A row that was {STILL_IMPROVING} would be better after a longer training, so "
        f"{consequence}."
    ]


def training_end(runs: RunGroup) -> str:
    """Return how the training of a row's seeds ended, for a table cell.

    Args:
        runs: The row's runs; at least one is finished.

    Returns:
        Such as "plateau, 840 steps" (mean over seeds), "600 steps, still improving", "60 steps" or "untrained".
    """
    steps = [taken for record in runs.finished if (taken := _steps(record)) is not None]
    if not steps:
        return "untrained"
    length = f"{round(float(np.mean(steps))):,} steps"
    if any(map(is_still_improving, runs.finished)):
        return f"{length}, {STILL_IMPROVING}"
    return f"plateau, {length}" if all(map(trains_until_plateau, runs.finished)) else length


def describe_training(records: Iterable[Record]) -> str:
    """Return a sentence on how the training of some records ended, "" if none of them was trained."""
    trained = [record for record in records if _steps(record) is not None]
    until_plateau = [record for record in trained if trains_until_plateau(record)]
    if not trained:
        return ""
    if not until_plateau:
        return "Training was of fixed length, so rows may still improve."
    improving = sum(map(is_still_improving, until_plateau))
    fixed = len(trained) - len(until_plateau)
    return (
        f"Training went on until validation loss stopped falling in {len(until_plateau) - improving} of {len(trained)} runs"
        + (f"; {improving} were {STILL_IMPROVING} at their greatest length" if improving else "")
        + (f"; {fixed} were of fixed length" if fixed else "")
        + "."
    )


def _steps(record: Record) -> int | None:
    """Return the optimizer steps of a record's training, None if it was not trained."""
    part = record.get("train")
    if not part:
        return None
    return part.get("steps") or max((entry.get("step", 0) for entry in part["log"]), default=0)
