"""Results of an experiment: the rows of its table filled with runs, and how the rows compare."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Integer

from experiments.records.views import Record, parse_outcomes, record_seed, start_time
from experiments.report.experiment_specs import ExperimentSpec, RowSettings
from experiments.report.question_pairing import may_be_paired
from experiments.report.run_groups import RunGroup
from experiments.report.statistics import CONFIDENCE_LEVEL, Interval, difference_interval, holm, paired_test
from experiments.report.training_ends import is_still_improving

ALPHA = 1 - CONFIDENCE_LEVEL
DIFFERENCE_RULE = (
    "p below 0.05 in an exact paired test over examples, and a 95% bootstrap interval over examples and seeds that "
    "excludes zero"
)
OTHER_FILES, OTHER_DATA = "the same settings with other files of the model", "the same settings on other data"
EQUIVALENCE_MARGIN = 0.02  # of accuracy; about the difference that 2,000 questions decide


@dataclass(frozen=True)
class ResultRow:
    """One row of an experiment's table with its runs.

    Args:
        number: Position of the row in the table, from 0.
        settings: Label, settings and printed values of the row.
        runs: Records of the row over its seeds; None if no seed was run.
        missing_seeds: Seeds that other rows have and this one does not.
    """

    number: int
    settings: RowSettings
    runs: RunGroup | None
    missing_seeds: tuple[Any, ...]

    @property
    def label(self) -> str:
        """Label of the row in tables and figures."""
        return self.settings.label

    @property
    def finished(self) -> bool:
        """Whether at least one seed is finished."""
        return self.runs is not None and bool(self.runs.finished)

    @property
    def status(self) -> str:
        """ "finished" if at least one seed is, else "failed" or "not run"."""
        return "not run" if self.runs is None else "finished" if self.finished else "failed"

    @property
    def still_improving(self) -> bool:
        """Whether a finished seed was to train until a plateau, and reached its greatest length before."""
        return self.runs is not None and any(map(is_still_improving, self.runs.finished))

    @property
    def first_record_id(self) -> str:
        """Identity of the first record, "" if there is none."""
        return self.runs.records[0]["id"] if self.runs is not None else ""

    @functools.cached_property
    def outcomes(self) -> Integer[np.ndarray, "seeds examples"]:
        """0/1 outcomes [seeds, examples].

        Raises:
            ValueError: if no seed is finished.
        """
        matrix = self.runs.outcomes() if self.runs is not None else None
        if matrix is None:
            raise ValueError(f"row '{self.label}' has no outcomes: it is {self.status}")
        return matrix


@dataclass(frozen=True)
class ExperimentResults:
    """An experiment's table over one family of runs: those that differ only in what the rows name.

    Args:
        spec: The experiment's rows, as conf/experiment/ defines them.
        rows: One entry for each row, in the table's order.
        excluded_families: For each other family of this experiment, the settings that set it apart; `OTHER_DATA` or
            `OTHER_FILES` where none does.
    """

    spec: ExperimentSpec
    rows: tuple[ResultRow, ...]
    excluded_families: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the experiment."""
        return self.spec.name

    @property
    def finished_rows(self) -> tuple[ResultRow, ...]:
        """The rows with at least one finished seed."""
        return tuple(row for row in self.rows if row.finished)

    @property
    def records(self) -> tuple[Record, ...]:
        """The records of all rows."""
        return tuple(record for row in self.rows if row.runs is not None for record in row.runs.records)

    @property
    def config(self) -> Mapping[str, Any]:
        """Configuration of the first run by dotted keys; settings that the rows do not name are the same in all runs."""
        return next(row.runs for row in self.rows if row.runs is not None).config

    @functools.cached_property
    def seeds(self) -> tuple[Any, ...]:
        """The seeds that at least one row has."""
        return tuple(sorted({record_seed(record) for record in self.records}, key=str))

    def comparable(self, first: ResultRow, second: ResultRow) -> bool:
        """Return whether both rows are finished with the same questions, so that these can be paired by index."""
        if first.runs is None or second.runs is None or not (first.finished and second.finished):
            return False
        return may_be_paired(first.runs, second.runs)

    def may_be_ordered(self, first: ResultRow, second: ResultRow) -> bool:
        """Return whether an ordering of two rows is judged: they are comparable, and neither was still improving."""
        return self.comparable(first, second) and not (first.still_improving or second.still_improving)

    def difference(self, first: ResultRow, second: ResultRow) -> Interval:
        """Return the accuracy of the first row minus that of the second, with a 95% interval over examples and seeds.

        The result depends only on the runs of the two rows. It is therefore the same in every table, and swapping the
        rows only flips its sign.
        """
        if first.first_record_id > second.first_record_id:
            mean, low, high = self.difference(second, first)
            return Interval(-mean, -high, -low)
        pair = first.number, second.number
        if pair not in self._differences:
            self._differences[pair] = difference_interval(first.outcomes, second.outcomes)
        return self._differences[pair]

    def p_value(self, first: ResultRow, second: ResultRow) -> float:
        """Return the p-value of the exact paired test of the two accuracies, two-sided and uncorrected."""
        return paired_test(first.outcomes, second.outcomes)

    def is_significant(self, first: ResultRow, second: ResultRow, p_value: float) -> bool:
        """Return whether two rows differ by `DIFFERENCE_RULE`: p < 0.05 and an interval that excludes zero."""
        interval = self.difference(first, second)
        return p_value < ALPHA and not interval.low <= 0 <= interval.high

    def is_equivalent(self, first: ResultRow, second: ResultRow) -> bool:
        """Return whether two rows differ by less than `EQUIVALENCE_MARGIN` (two one-sided tests, Schuirmann 1987).

        The whole 95% interval must be nearer to zero than the margin. Among few examples equal answers prove little: a
        difference of up to 3 / examples then has a chance of more than 5% to stay unseen (the rule of three).
        """
        interval = self.difference(first, second)
        unseen = 3 / first.outcomes.shape[1]
        return max(-interval.low, interval.high, unseen) < EQUIVALENCE_MARGIN

    def holm_p_values(self, pairs: Sequence[tuple[ResultRow, ResultRow]]) -> list[float | None]:
        """Return the p-value of each pair, Holm-corrected for the number of comparable pairs; None if not comparable."""
        compared = [pair for pair in pairs if self.comparable(*pair)]
        corrected = iter(holm([self.p_value(*pair) for pair in compared]))
        return [next(corrected) if self.comparable(*pair) else None for pair in pairs]

    @functools.cached_property
    def ranked_rows(self) -> tuple[ResultRow, ...]:
        """The finished rows by accuracy, highest first."""
        return tuple(sorted(self.finished_rows, key=lambda row: -row.outcomes.mean()))

    @functools.cached_property
    def best_row(self) -> ResultRow | None:
        """The row with the highest accuracy if it differs from every other finished row by the rule, else None.

        There is none among rows of which one was still improving. All tests must agree, so their p-values need no correction.
        """
        if len(self.finished_rows) < 2:
            return None
        first, *others = self.ranked_rows
        beats_others = (
            self.may_be_ordered(first, other) and self.is_significant(first, other, self.p_value(first, other))
            for other in others
        )
        return first if all(beats_others) else None

    @functools.cached_property
    def _differences(self) -> dict[tuple[int, int], Interval]:
        return {}


def match_results(
    spec: ExperimentSpec, groups: Iterable[RunGroup], requested: bool = False
) -> ExperimentResults | None:
    """Fill the rows of an experiment with the runs that have their settings.

    Runs form families that differ only in what the rows name. The family with most finished runs is shown; among equals
    the newest. A family counts if one of its records was made for this experiment or if all its rows are finished.

    Args:
        spec: The experiment's rows.
        groups: All run groups of a results folder.
        requested: Whether the user named the experiment; then every family counts.

    Returns:
        The results, or None if no family counts.
    """
    families = [
        family for family in _find_families(spec, groups) if requested or _belongs_to_experiment(spec, family.runs)
    ]
    if not families:
        return None
    shown, *others = sorted(families, key=lambda family: _completeness(family.runs), reverse=True)
    seeds = {record_seed(record) for group in shown.runs if group for record in group.records}
    rows = [
        ResultRow(number, settings, group, _missing_seeds(group, seeds))
        for number, (settings, group) in enumerate(zip(shown.settings, shown.runs, strict=True))
    ]
    excluded = [_describe_difference(spec, shown.runs, other.runs) for other in others]
    excluded += dict.fromkeys(shown.left_out)
    return ExperimentResults(spec, tuple(rows), tuple(excluded))


def blind_accuracies(results: ExperimentResults) -> dict[str, float]:
    """Return the mean outcomes (0 to 1) of the blind controls by label, as far as they were recorded.

    The controls are the text-only guess, and a blank image with the first row that measured it.
    """
    accuracies: dict[str, float] = {}
    for row in results.finished_rows:
        assert row.runs is not None
        guess, blank = row.runs.finished[0]["data"].get("guess"), row.runs.outcomes("blank")
        if guess is not None:
            accuracies.setdefault("text-only guess", float(parse_outcomes(guess).mean()))
        if blank is not None and not any("blank" in name for name in accuracies):
            accuracies[f"{row.label}, blank image"] = float(blank.mean())
    return accuracies


@dataclass(frozen=True)
class _Family:
    """Runs on the same data that differ only in what an experiment's rows name.

    Attributes:
        settings: The rows, with sizes scaled to the model of these runs.
        matching: All groups with the settings of each row. Several differ in their data or in the files of their models.
        runs: The group that fills each row, None if there is none.
    """

    settings: Sequence[RowSettings]
    matching: Sequence[Sequence[RunGroup]]
    runs: Sequence[RunGroup | None]

    @property
    def left_out(self) -> Iterator[str]:
        """What sets the finished groups apart that have a row's settings and do not fill it."""
        for groups, chosen in zip(self.matching, self.runs, strict=True):
            for group in groups:
                if chosen is not None and group.finished and group is not chosen:
                    yield OTHER_DATA if group.model_files == chosen.model_files else OTHER_FILES


def _find_families(spec: ExperimentSpec, groups: Iterable[RunGroup]) -> Iterator[_Family]:
    """Yield the families of runs of which at least one fills a row."""
    alike: dict[frozenset[tuple[str, str]], list[RunGroup]] = defaultdict(list)
    for group in groups:
        if all(key in group.config for key in spec.setting_keys):
            rest = {(key, repr(value)) for key, value in group.config.items() if not spec.may_vary(key)}
            alike[frozenset(rest)].append(group)
    for members in alike.values():
        try:
            settings = spec.resolve_rows(members[0].config)
        except ValueError:  # a size scales with a grid that this configuration lacks: it belongs to no row
            continue
        for same_data in _split_by_data(members, spec):
            matching = [[group for group in same_data if _has_settings(group, row.values)] for row in settings]
            runs = [_choose_group(groups, matching) for groups in matching]
            if any(runs):
                yield _Family(settings, matching, runs)


def _missing_seeds(group: RunGroup | None, seeds: Collection[int | None]) -> tuple[int | None, ...]:
    """Return the seeds of an experiment that a row has no record of."""
    present = set(map(record_seed, group.records)) if group else set()
    return tuple(sorted(set(seeds) - present, key=str))


def _split_by_data(family: Sequence[RunGroup], spec: ExperimentSpec) -> list[list[RunGroup]]:
    """Split a family by the data of its runs, unless the experiment's rows vary the data."""
    fingerprints = sorted({group.fingerprint for group in family if group.finished})
    if len(fingerprints) < 2 or any(key.startswith("data.") for key in spec.setting_keys):
        return [list(family)]
    return [[group for group in family if group.fingerprint in (name, "")] for name in fingerprints]


def _has_settings(group: RunGroup, values: Mapping[str, Any]) -> bool:
    return all(group.config[key] == value for key, value in values.items())


def _choose_group(groups: Sequence[RunGroup], matching: Sequence[Sequence[RunGroup]]) -> RunGroup | None:
    """Return the group of one row whose model's files most records of the table share; among equals the newest.

    Args:
        groups: The groups with the row's settings.
        matching: The groups of all rows.
    """

    def sharing(group: RunGroup) -> int:
        alike = (other for others in matching for other in others if other.model_files == group.model_files)
        return sum(len(other.finished) for other in alike)

    return max(groups, key=lambda group: (bool(group.finished), sharing(group), _recency(group)), default=None)


def _recency(group: RunGroup) -> tuple[bool, str, str]:
    """Return a sort key: unfinished groups first, then by start time, then by identity."""
    return bool(group.finished), max(map(start_time, group.records)), group.records[0]["id"]


def _belongs_to_experiment(spec: ExperimentSpec, runs: Sequence[RunGroup | None]) -> bool:
    complete = all(group is not None and group.finished for group in runs)
    return complete or any(r["experiment"] == spec.name for group in runs if group for r in group.records)


def _completeness(runs: Sequence[RunGroup | None]) -> tuple[int, tuple[bool, str, str]]:
    """Return a sort key: number of finished records, then recency."""
    groups = [group for group in runs if group is not None]
    return sum(len(group.finished) for group in groups), max(map(_recency, groups))


def _describe_difference(
    spec: ExperimentSpec, runs: Sequence[RunGroup | None], others: Sequence[RunGroup | None]
) -> str:
    """Return the settings that set another family apart, as "key=value, ..."."""
    here, there = (next(group for group in groups if group is not None) for groups in (runs, others))
    keys = sorted(key for key in here.config.keys() | there.config.keys() if not spec.may_vary(key))
    different = [key for key in keys if here.config.get(key, math.nan) != there.config.get(key, math.nan)]
    return ", ".join(f"{key}={there.config.get(key, 'unset')}" for key in different) or OTHER_DATA
