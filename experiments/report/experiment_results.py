"""Studies: an experiment's rows filled with the cells that belong to them, and how the rows compare."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Integer

from experiments.records.views import Record, outcomes, seed, started
from experiments.report.experiment_specs import Definition, Setting
from experiments.report.run_groups import Cell
from experiments.report.statistics import LEVEL, Interval, difference_interval, holm, paired_test

ALPHA = 1 - LEVEL
RULE = (
    "p below 0.05 in an exact paired test over examples, and a 95% bootstrap interval over examples and seeds that "
    "leaves zero out"
)


@dataclass(frozen=True)
class Row:
    """A row of a study: its place, its settings and its cell, None where none of its seeds was run.

    `absent` are seeds that other rows have and this one does not.
    """

    number: int
    setting: Setting
    cell: Cell | None
    absent: tuple[Any, ...]

    @property
    def label(self) -> str:
        return self.setting.label

    @property
    def finished(self) -> bool:
        return self.cell is not None and bool(self.cell.finished)

    @property
    def state(self) -> str:
        """ "finished" where a seed is, else "failed" or "not run"."""
        return "not run" if self.cell is None else "finished" if self.finished else "failed"

    @property
    def identity(self) -> str:
        """Of its first record, "" where there is none."""
        return self.cell.records[0]["id"] if self.cell is not None else ""

    @functools.cached_property
    def outcomes(self) -> Integer[np.ndarray, "seeds examples"]:
        """0/1 outcomes [seeds, examples]. Raises ValueError if no seed is finished."""
        found = self.cell.outcomes() if self.cell is not None else None
        if found is None:
            raise ValueError(f"row '{self.label}' is {self.state}")
        return found


@dataclass(frozen=True)
class Study:
    """An experiment's table over one family of cells: those that differ in nothing but what the rows name.

    `left_out` says of each other family that this experiment was run with what sets it apart.
    """

    definition: Definition
    rows: tuple[Row, ...]
    left_out: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.definition.name

    @property
    def finished(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.finished)

    @property
    def records(self) -> tuple[Record, ...]:
        return tuple(record for row in self.rows if row.cell is not None for record in row.cell.records)

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration of some cell, by dotted keys: what the rows do not name is that of all."""
        return next(row.cell for row in self.rows if row.cell is not None).config

    @functools.cached_property
    def seeds(self) -> tuple[Any, ...]:
        """The seeds that any row has."""
        return tuple(sorted({seed(record) for record in self.records}, key=str))

    def comparable(self, first: Row, second: Row) -> bool:
        """Whether both are finished, on as many examples: the nth of either is then taken together."""
        return first.finished and second.finished and first.outcomes.shape[1] == second.outcomes.shape[1]

    def difference(self, first: Row, second: Row) -> Interval:
        """Accuracy of the first less that of the second, with a 95% interval over examples and seeds.

        It depends on the two cells alone, so that it is the same in every table and with its sign turned the other way
        round.
        """
        if first.identity > second.identity:
            mean, low, high = self.difference(second, first)
            return Interval(-mean, -high, -low)
        pair = first.number, second.number
        if pair not in self._differences:
            self._differences[pair] = difference_interval(first.outcomes, second.outcomes)
        return self._differences[pair]

    def p_value(self, first: Row, second: Row) -> float:
        """Of the exact paired test of the two accuracies, two-sided and not corrected."""
        return paired_test(first.outcomes, second.outcomes)

    def differ(self, first: Row, second: Row, p_value: float) -> bool:
        """The rule of all tables: p below 0.05, and an interval over examples and seeds that leaves zero out."""
        found = self.difference(first, second)
        return p_value < ALPHA and not found.low <= 0 <= found.high

    def p_corrected(self, pairs: Sequence[tuple[Row, Row]]) -> list[float | None]:
        """P-values of comparable pairs corrected (Holm) for their number; None where a pair is not comparable."""
        compared = [pair for pair in pairs if self.comparable(*pair)]
        found = iter(holm([self.p_value(*pair) for pair in compared]))
        return [next(found) if self.comparable(*pair) else None for pair in pairs]

    @functools.cached_property
    def ranked(self) -> tuple[Row, ...]:
        """The finished rows, the highest accuracy first."""
        return tuple(sorted(self.finished, key=lambda row: -row.outcomes.mean()))

    @functools.cached_property
    def best(self) -> Row | None:
        """The row with the highest accuracy if it differs from every other finished row by the rule, else None.

        All tests must agree, so their p-values need no correction.
        """
        if len(self.finished) < 2:
            return None
        first, *others = self.ranked
        ahead = (self.comparable(first, o) and self.differ(first, o, self.p_value(first, o)) for o in others)
        return first if all(ahead) else None

    @functools.cached_property
    def _differences(self) -> dict[tuple[int, int], Interval]:
        return {}


def study_of(definition: Definition, cells: Iterable[Cell], asked: bool = False) -> Study | None:
    """The study of an experiment over the family that has most of its cells finished (of equals the newest).

    A family counts if one of its records was made for this experiment, if it has all rows finished, or, where the
    experiment is `asked` for by name, in any case. None if there is no such family.
    """
    families: dict[frozenset[tuple[str, str]], list[Cell]] = defaultdict(list)
    for cell in cells:
        if all(key in cell.config for key in definition.keys):
            rest = {(key, repr(value)) for key, value in cell.config.items() if not definition.leaves_open(key)}
            families[frozenset(rest)].append(cell)
    found = []
    for family in families.values():
        try:
            settings = definition.settings(family[0].config)
        except ValueError:  # a size that scales with a grid this configuration does not say: no row ran with it
            continue
        for alike in _same_data(family, definition):
            placed = [_newest(cell for cell in alike if _has(cell, setting.values)) for setting in settings]
            if any(placed):
                found.append((settings, placed))
    counted = [(settings, placed) for settings, placed in found if asked or _meant(definition, placed)]
    if not counted:
        return None
    counted.sort(key=lambda entry: _weight(entry[1]), reverse=True)
    settings, placed = counted[0]
    seeds = sorted({seed(record) for cell in placed if cell for record in cell.records}, key=str)
    rows = tuple(
        Row(number, setting, cell, tuple(s for s in seeds if cell is None or s not in map(seed, cell.records)))
        for number, (setting, cell) in enumerate(zip(settings, placed, strict=True))
    )
    left_out = [_apart(definition, placed, other) for _, other in counted[1:]]
    return Study(definition, rows, tuple(left_out))


def _same_data(family: Sequence[Cell], definition: Definition) -> list[list[Cell]]:
    """Cells of one configuration on other data are families of their own, unless the rows are about the data."""
    prints = sorted({cell.fingerprint for cell in family if cell.finished})
    if len(prints) < 2 or any(key.startswith("data.") for key in definition.keys):
        return [list(family)]
    return [[cell for cell in family if cell.fingerprint in (name, "")] for name in prints]


def _has(cell: Cell, values: Mapping[str, Any]) -> bool:
    return all(cell.config[key] == value for key, value in values.items())


def _newest(cells: Iterable[Cell]) -> Cell | None:
    return max(cells, key=_age, default=None)


def _age(cell: Cell) -> tuple[bool, str, str]:
    return bool(cell.finished), max(map(started, cell.records)), cell.records[0]["id"]


def _meant(definition: Definition, placed: Sequence[Cell | None]) -> bool:
    whole = all(cell is not None and cell.finished for cell in placed)
    return whole or any(r["experiment"] == definition.name for cell in placed if cell for r in cell.records)


def _weight(placed: Sequence[Cell | None]) -> tuple[int, tuple[bool, str, str]]:
    cells = [cell for cell in placed if cell is not None]
    return sum(len(cell.finished) for cell in cells), max(map(_age, cells))


def _apart(definition: Definition, placed: Sequence[Cell | None], others: Sequence[Cell | None]) -> str:
    """What sets the cells of another family apart, as settings."""
    here, there = (next(cell for cell in cells if cell is not None) for cells in (placed, others))
    keys = sorted(key for key in here.config.keys() | there.config.keys() if not definition.leaves_open(key))
    different = [key for key in keys if here.config.get(key, math.nan) != there.config.get(key, math.nan)]
    return (
        ", ".join(f"{key}={there.config.get(key, 'unset')}" for key in different) or "the same settings on other data"
    )


def references(study: Study) -> dict[str, float]:
    """Mean outcomes (0 to 1) without sight: a guess from the text alone, and the first row that measured it with a blank
    picture, where they were recorded."""
    found: dict[str, float] = {}
    for row in study.finished:
        assert row.cell is not None
        guess, blank = row.cell.finished[0]["data"].get("guess"), row.cell.outcomes("blank")
        if guess is not None:
            found.setdefault("text-only guess", float(outcomes(guess).mean()))
        if blank is not None and not any("blank" in name for name in found):
            found[f"{row.label}, blank picture"] = float(blank.mean())
    return found
