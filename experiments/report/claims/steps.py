"""Claims that one accuracy is above another in every step: bootstrap intervals and exact paired tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Integer

from experiments.report.claims.answers import (
    ALPHA,
    DOES_NOT_HOLD,
    HOLDS,
    POWER_FACTOR,
    UNDECIDED,
    Estimate,
    undefined,
)
from experiments.report.statistics import Interval, contrast_interval, paired_test

Outcomes = Integer[np.ndarray, "seeds questions"]
_FEWEST_DISCORDANT = 7.9
"""Mean number of discordant outcomes with which 80% of samples hold 6, the fewest that a test at level 0.025 rejects by."""


@dataclass(frozen=True)
class Step:
    """A difference of summed accuracies: those of `higher` minus those of `lower`.

    Args:
        higher: 0/1 outcomes that the claim puts higher.
        lower: 0/1 outcomes that it puts lower, as many as `higher`.
        same_models: Whether all outcomes are of the same trained models, so that seeds are drawn together.
    """

    higher: tuple[Outcomes, ...]
    lower: tuple[Outcomes, ...]
    same_models: bool = False

    def select(self, questions: Bool[np.ndarray, " questions"]) -> Step:
        """Return the step on some questions."""
        higher, lower = (tuple(outcomes[:, questions] for outcomes in part) for part in (self.higher, self.lower))
        return Step(higher, lower, self.same_models)

    def interval(self) -> Interval:
        """Return the difference with its 95% interval over questions and seeds."""
        if self.same_models:
            difference = sum(part.astype(float) for part in self.higher) - sum(self.lower)
            return contrast_interval([(1, np.asarray(difference))])
        return contrast_interval([*((1, part) for part in self.higher), *((-1, part) for part in self.lower)])

    def p_values(self) -> tuple[float, float]:
        """Return the exact one-sided p-values: of no positive difference, and of no negative one."""
        higher, lower = np.concatenate(self.higher), np.concatenate(self.lower)
        return paired_test(higher, lower, "greater"), paired_test(lower, higher, "greater")


@dataclass(frozen=True)
class Steps:
    """Steps that a claim needs all of.

    Args:
        steps: The steps, at least one.
    """

    steps: Sequence[Step]

    @property
    def questions(self) -> int:
        """Number of questions that were measured."""
        return self.steps[0].higher[0].shape[1]

    def estimate(self, selected: Bool[np.ndarray, " questions"]) -> Estimate:
        """Return the step that decides over some questions, with the answer over all steps.

        That is the step with the strongest evidence against the claim if the claim does not hold, and otherwise the one with the
        weakest evidence for it.

        Args:
            selected: The questions to use.
        """
        questions = int(selected.sum())
        seeds = min(len(outcomes) for step in self.steps for outcomes in (*step.higher, *step.lower))
        if not questions:
            return undefined(0, seeds, "no questions")
        steps = [step.select(selected) for step in self.steps]
        intervals = [step.interval() for step in steps]
        p_values = [step.p_values() for step in steps]
        pairs = list(zip(intervals, p_values, strict=True))
        answer = UNDECIDED
        if all(interval.low > 0 and above < ALPHA for interval, (above, _) in pairs):
            answer = HOLDS
        elif any(interval.high < 0 and below * len(steps) < ALPHA for interval, (_, below) in pairs):
            answer = DOES_NOT_HOLD
        least, _ = min(pairs, key=_opposes) if answer == DOES_NOT_HOLD else max(pairs, key=_lacks_support)
        effect = max(POWER_FACTOR * (least.high - least.low), _FEWEST_DISCORDANT / (questions * seeds))
        return Estimate(*least, questions, seeds, effect, answer)


def _opposes(step: tuple[Interval, tuple[float, float]]) -> tuple[bool, float, float]:
    """Return a sort key of a step's interval and p-values: smallest for the strongest evidence against the claim."""
    interval, (_, below) = step
    return interval.high >= 0, below, interval.mean


def _lacks_support(step: tuple[Interval, tuple[float, float]]) -> tuple[bool, float, float]:
    """Return a sort key of a step's interval and p-values: largest for the weakest evidence for the claim."""
    interval, (above, _) = step
    return interval.low <= 0, above, -interval.mean
