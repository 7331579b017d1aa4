"""Answers to a claim, and the estimate that an answer is read off."""

from __future__ import annotations

import math
from dataclasses import dataclass

HOLDS, DOES_NOT_HOLD, UNDECIDED = "holds", "does not hold", "cannot be told"
ALPHA = 0.025
"""One-sided level of the tests: that of a 95% interval on each side."""
TOO_FEW = "too few questions"
POWER_FACTOR = (1.959964 + 0.841621) / (2 * 1.959964)
"""Smallest effect that is found with 80% power, over the width of a 95% interval."""


@dataclass(frozen=True)
class Estimate:
    """The statistic of a claim with its answer.

    Args:
        value: The statistic: a share or a difference of accuracies. NaN if it is not defined.
        low: Lower bound of its 95% interval.
        high: Upper bound of its 95% interval.
        questions: Number of questions.
        seeds: Number of seeds; the smallest if rows differ in it.
        smallest_effect: Distance from the claim's line that is found with 80% power.
        answer: One of `HOLDS`, `DOES_NOT_HOLD` and `UNDECIDED`.
        reason: Why the statistic is not defined or not judged, "" if it is.
    """

    value: float
    low: float
    high: float
    questions: int
    seeds: int
    smallest_effect: float
    answer: str
    reason: str = ""


def undefined(questions: int, seeds: int, reason: str) -> Estimate:
    """Return the estimate of a statistic that is not defined.

    Args:
        questions: Number of questions.
        seeds: Number of seeds.
        reason: Why it is not defined.
    """
    return Estimate(math.nan, math.nan, math.nan, questions, seeds, math.nan, UNDECIDED, reason)
