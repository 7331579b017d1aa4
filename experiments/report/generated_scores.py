"""Scores of generated answers of run groups, and how two groups compare."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Integer

from experiments.records.generated import score_name
from experiments.report.run_groups import RunGroup
from experiments.report.statistics import Interval, contrast_interval

SCORE_UNIT = 10
"""Scores are whole tenths, so that the exact paired test of accuracies holds for them too."""

_RULES = {
    (
        "vqa",
        10,
    ): "a third of the annotators with this answer, at most 1, mean over the ten sets of nine annotators; answers are "
    "compared without case, articles and punctuation (Goyal et al. 2017)",
    ("vqa", 1): "1 if it is the right answer without case, articles and punctuation (Goyal et al. 2017)",
    ("gqa", 1): "1 if it is the right answer without case and punctuation",
}


def generated_of(group: RunGroup) -> Mapping[str, Any] | None:
    """Return the `generated` part of a group's first finished record; None if a finished record has none."""
    parts = [record.get("generated") for record in group.finished]
    return parts[0] if parts and None not in parts else None


def score_tenths(group: RunGroup, view: str = "image") -> Integer[np.ndarray, "seeds examples"] | None:
    """Return the scores of a group's generated answers in tenths.

    Args:
        group: The group.
        view: "image" (the question's image), "blank" or "shuffled".

    Returns:
        Whole numbers from 0 to 10; None if a finished seed has no such scores.
    """
    views = [(record.get("generated") or {}).get(view) for record in group.finished]
    scores = [scored["scores"] for scored in views if scored is not None]
    if not scores or len(scores) < len(views):
        return None
    return np.rint(SCORE_UNIT * np.array(scores)).astype(int)


def score_interval(
    tenths: Integer[np.ndarray, "seeds examples"], baseline: Integer[np.ndarray, "others examples"] | None = None
) -> Interval:
    """Return the mean score from 0 to 1, or its difference from a baseline's, with a 95% interval.

    Examples and seeds are resampled as for accuracy.

    Args:
        tenths: Scores in tenths.
        baseline: Scores of the baseline on the same examples.
    """
    terms = [(1, tenths / SCORE_UNIT)] + ([] if baseline is None else [(-1, baseline / SCORE_UNIT)])
    return contrast_interval(terms)


def score_note(part: Mapping[str, Any]) -> str:
    """Return the sentences that define a metric below a table.

    Args:
        part: The `generated` part of a record.
    """
    rule = _RULES[part["metric"], part["references"]]
    return (
        f"{score_name(part)}: the model writes an answer greedily, of at most {part['max_new_tokens']} tokens. Its score: "
        f"{rule}. Interval, difference and p are made as those of accuracy."
    )
