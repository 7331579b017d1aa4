"""The condition of claims on interventions: the answers need the question's own image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, UInt8

from experiments.data.question_types import FEWEST_QUESTIONS
from experiments.records.views import Record, parse_outcomes
from experiments.report.claims.answers import HOLDS, TOO_FEW, Estimate, undefined
from experiments.report.claims.claim import Statistic
from experiments.report.claims.steps import Step, Steps

NOT_NEEDED = "it is not shown that the answers need the image"


@dataclass(frozen=True)
class IfImageIsNeeded:
    """A statistic that is judged only if the answers need the image.

    Hiding the image can change how often a model gives the right answer without its answers needing the image: a model
    with random weights may write a colour without the image, and another word with it. Its answers then are right as
    often with another question's image.

    Args:
        statistic: The statistic.
        needs: The steps that must hold: the own image above no image, and above another question's image.
    """

    statistic: Statistic
    needs: Steps

    @property
    def questions(self) -> int:
        """Number of questions that were measured."""
        return self.statistic.questions

    def estimate(self, selected: Bool[np.ndarray, " questions"]) -> Estimate:
        """Return the estimate over some questions; undefined if it is not shown that their answers need the image.

        Args:
            selected: The questions to use.
        """
        needed = self.needs.estimate(selected)
        if needed.questions < FEWEST_QUESTIONS:
            return undefined(needed.questions, needed.seeds, TOO_FEW)
        if needed.answer != HOLDS:
            return undefined(needed.questions, needed.seeds, NOT_NEEDED)
        return self.statistic.estimate(selected)


def if_image_is_needed(
    statistic: Statistic, records: Sequence[Record], hidden: UInt8[np.ndarray, "seeds questions"] | None = None
) -> Statistic:
    """Return the statistic under the condition that the answers need the image.

    Args:
        statistic: The statistic.
        records: The finished records of its seeds. Another question's image is compared if all of them hold it.
        hidden: Outcomes without the image. None if the statistic itself is undefined where hiding the image costs nothing.
    """
    lower = [] if hidden is None else [hidden]
    shuffled = [record["accuracy"].get("shuffled") for record in records]
    if all(text is not None for text in shuffled):
        lower.append(np.stack([parse_outcomes(text) for text in shuffled]))
    if not lower:
        return statistic
    own = np.stack([parse_outcomes(record["accuracy"]["image"]) for record in records])
    return IfImageIsNeeded(statistic, Steps([Step((own,), (other,), same_models=True) for other in lower]))
