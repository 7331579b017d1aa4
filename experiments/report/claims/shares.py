"""Claims that a share of a total is above a line: bootstrap interval, and Student's t with one adverse question."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from experiments.data.question_types import FEWEST_QUESTIONS
from experiments.report.claims.answers import (
    DOES_NOT_HOLD,
    HOLDS,
    POWER_FACTOR,
    TOO_FEW,
    UNDECIDED,
    Estimate,
    undefined,
)
from experiments.report.statistics import TAILS, crossed_draws


@dataclass(frozen=True)
class Share:
    """A part and its whole in every question of every seed; both are linear, so their means are compared.

    Args:
        part: The part, [seeds, questions]; NaN where it is not defined.
        whole: The whole, [seeds, questions].
        line: Share above which the claim holds.
        floor: Mean of the whole that must be exceeded; at or below it, there is nothing to share.
        nothing: Why the share is not defined if the whole is not above the floor.
        least: Least absolute value of an adverse question: 1 for outcomes, 0 for quantities without a natural one.
    """

    part: Float[np.ndarray, "seeds questions"]
    whole: Float[np.ndarray, "seeds questions"]
    line: float
    floor: float
    nothing: str
    least: float = 1.0

    @property
    def questions(self) -> int:
        """Number of questions that were measured."""
        return self.part.shape[1]

    def estimate(self, selected: Bool[np.ndarray, " questions"]) -> Estimate:
        """Return the share over some questions, with its interval and answer.

        Args:
            selected: The questions to use.
        """
        chosen = selected & ~np.isnan(self.part + self.whole).any(0)
        part, whole = self.part[:, chosen], self.whole[:, chosen]
        seeds, questions = part.shape
        if questions < FEWEST_QUESTIONS:
            return undefined(questions, seeds, TOO_FEW)
        part_draws, whole_draws = crossed_draws(np.stack([part, whole]))
        above_floor = np.quantile(whole_draws, TAILS[0]) > self.floor and mean_is_positive(
            whole.mean(0) - self.floor, self.least
        )
        if not above_floor:
            return undefined(questions, seeds, self.nothing)
        with np.errstate(divide="ignore", invalid="ignore"):
            low, high = map(float, np.quantile(part_draws / whole_draws, TAILS))
        excess = (part - self.line * whole).mean(0)
        answer = UNDECIDED
        if low > self.line and mean_is_positive(excess, self.least):
            answer = HOLDS
        elif high < self.line and mean_is_positive(-excess, self.least):
            answer = DOES_NOT_HOLD
        value = float(part.mean() / whole.mean())
        # Equal outcomes give an interval without width. Up to 3 in n questions may still differ (the rule of three).
        effect = max(POWER_FACTOR * (high - low), 3 * self.least / questions)
        return Estimate(value, low, high, questions, seeds, effect, answer)


def mean_is_positive(values: Float[np.ndarray, " questions"], least: float) -> bool:
    """Return whether the mean over all questions is positive: Student's t, one-sided, level 0.025.

    One more question with an adverse value is added: minus the largest absolute value measured, or -`least`. Without it,
    a sample that happens to hold no rare adverse question would have too small a variance.

    Args:
        values: One value for each question.
        least: Least absolute value of the added question.

    Example:
        >>> import numpy as np
        >>> mean_is_positive(np.ones(5), 1.0), mean_is_positive(np.ones(60), 1.0)
        (False, True)
    """
    guarded = np.append(values, -max(least, float(np.abs(values).max())))
    freedom = len(guarded) - 1
    error = guarded.std(ddof=1) / np.sqrt(len(guarded))
    return bool(guarded.mean() > _t_quantile(freedom) * error)


def _t_quantile(freedom: int) -> float:
    """Return the 0.975 quantile of Student's t by its expansion around the normal (Fisher and Cornish 1960)."""
    z = 1.959964
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))
