"""A claim of the paper, and a case: the measurements that one claim is tested on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from jaxtyping import Bool

from experiments.records.views import Record
from experiments.report.claims.answers import Estimate
from experiments.report.run_groups import RunGroup


class Statistic(Protocol):
    """A statistic over questions that answers a claim."""

    @property
    def questions(self) -> int:
        """Number of questions that were measured."""

    def estimate(self, selected: Bool[np.ndarray, " questions"]) -> Estimate:
        """Return the statistic over some questions, with its interval and answer."""


@dataclass(frozen=True)
class Case:
    """Measurements that a claim is tested on.

    Args:
        statistic: The statistic over the questions.
        groups: The runs whose records were used, the first being what a table names.
        settings: The settings that all of them share, by dotted key.
        detail: What was compared, such as "0 to 4 pre-fusion layers".
    """

    statistic: Statistic
    groups: tuple[RunGroup, ...]
    settings: Mapping[str, Any]
    detail: str

    @property
    def records(self) -> tuple[Record, ...]:
        """The finished records that were used."""
        return tuple(record for group in self.groups for record in group.finished)


@dataclass(frozen=True)
class Claim:
    """A claim of the paper with the statistic that tests it; docs/claims.md has the formulas.

    Args:
        key: Short name, as in the documentation.
        source: Figure, table or section of the paper.
        statement: What the paper states, as one short sentence.
        unit: "share" (of a total) or "difference" (of accuracies).
        line: Value of the statistic above which the claim holds.
        find_cases: Function from the runs of a results folder to the cases that they hold.
    """

    key: str
    source: str
    statement: str
    unit: str
    line: float
    find_cases: Callable[[Sequence[RunGroup]], Iterator[Case]]
