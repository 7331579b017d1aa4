"""Orderings table: which of the paper's orderings of rows hold in an experiment's results."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pandas as pd

from experiments.report.claims.answers import UNDECIDED
from experiments.report.experiment_results import DIFFERENCE_RULE, EQUIVALENCE_MARGIN, ExperimentResults, ResultRow
from experiments.report.formatting import EXACT_MATCH, format_interval, format_p_value, format_signed
from experiments.report.tables.experiment_rows import BENCHMARKS, describe_measurement, finished_records
from experiments.report.tables.table import Table, interval_columns
from experiments.report.training_ends import STILL_IMPROVING, describe_training

HOLDS, REVERSED = "holds", "does not hold"
EQUAL = f"equal within {100 * EQUIVALENCE_MARGIN:.0f} points"
IMPROVING = f"{UNDECIDED} ({STILL_IMPROVING})"


def orderings_table(results: ExperimentResults) -> Table | None:
    """Build the table of all pairs of rows that the paper orders the same way on every one of `BENCHMARKS`.

    An ordering holds if the two rows differ by `DIFFERENCE_RULE`, with p-values Holm-corrected for the number of pairs,
    in the paper's direction. It does not hold if they differ in the opposite direction. If they do not differ, they
    may be equal within `EQUIVALENCE_MARGIN` (`ExperimentResults.is_equivalent`). Otherwise it cannot be told. An ordering
    of a row that was still improving when its training ended is not tested.

    Args:
        results: The experiment's rows with their runs.

    Returns:
        The table, or None if the paper orders no two rows.
    """
    pairs = [pair for two in combinations(results.rows, 2) if (pair := _paper_order(*two)) is not None]
    if not pairs:
        return None
    data, text = [], []
    tested = [pair for pair in pairs if results.may_be_ordered(*pair)]
    p_values = iter(results.holm_p_values(tested))
    for higher, lower in pairs:
        comparable = results.comparable(higher, lower)
        improving = comparable and not results.may_be_ordered(higher, lower)
        p_value = next(p_values) if comparable and not improving else None
        difference = results.difference(higher, lower) if comparable else None
        answer = IMPROVING if improving else UNDECIDED
        if p_value is not None and difference is not None:
            if results.is_significant(higher, lower, p_value):
                answer = HOLDS if difference.mean > 0 else REVERSED
            elif results.is_equivalent(higher, lower):
                answer = EQUAL
        unfinished = next((row.status for row in (higher, lower) if not row.finished), "other questions")
        reason = STILL_IMPROVING if improving else unfinished
        margins = {name: _smallest_margin(higher, lower, name) for name in BENCHMARKS}
        data.append(
            {
                "higher": higher.label,
                "lower": lower.label,
                **{f"paper_{name}": margin for name, margin in margins.items()},
                **interval_columns("difference", difference),
                "p_holm": p_value,
                "answer": answer,
            }
        )
        text.append(
            {
                "Higher in the paper": higher.label,
                "Lower": lower.label,
                **{f"Paper, {BENCHMARKS[name]}": format_signed(margin) for name, margin in margins.items()},
                "Here": format_interval(difference, sign=True) if difference else unfinished,
                "p": format_p_value(p_value) if p_value is not None else reason,
                "Ordering": answer,
            }
        )
    frame = pd.DataFrame(data)
    counts = {answer: int((frame["answer"] == answer).sum()) for answer in (HOLDS, REVERSED, EQUAL, UNDECIDED)}
    if improving_count := int((frame["answer"] == IMPROVING).sum()):
        counts[IMPROVING] = improving_count
    merged = [row.label for row in results.rows if len(row.settings.paper) > 1]
    notes = (
        f"Percentage points. An ordering holds, or does not hold, if the two rows differ here by the rule: "
        f"{DIFFERENCE_RULE}; p is Holm-corrected for the number of pairs. The paper gives no intervals, so its order is "
        "taken as printed.",
        f"{EQUAL.capitalize()}: no difference by this rule, and the whole 95% interval is nearer to zero than that. The "
        "paper's own difference can be smaller still.",
        *([f"Not among the pairs, because they are one row on this model: {'; '.join(merged)}."] if merged else []),
    )
    caption = (
        f"{results.spec.title} Of the {len(pairs)} pairs of rows that the paper orders the same way on "
        f"{', '.join(BENCHMARKS.values())}, here by accuracy ({EXACT_MATCH}; {describe_measurement(results)}): "
        + "; ".join(f"{answer}: {count}" for answer, count in counts.items())
        + "."
    )
    if training := describe_training(finished_records(results)):
        caption += f" {training}"
    numeric = tuple(column for column in text[0] if column not in ("Higher in the paper", "Lower", "Ordering"))
    return Table(f"{results.name}_orderings", caption, frame, pd.DataFrame(text), numeric, notes)


def _paper_order(first: ResultRow, second: ResultRow) -> tuple[ResultRow, ResultRow] | None:
    """Return the two rows, higher first, if the paper puts the same one higher on every benchmark; else None."""
    for higher, lower in ((first, second), (second, first)):
        if all(_smallest_margin(higher, lower, name) > 0 for name in BENCHMARKS):
            return higher, lower
    return None


def _smallest_margin(higher: ResultRow, lower: ResultRow, benchmark: str) -> float:
    """Return the smallest margin between the printed values of two rows; NaN if a value is not printed.

    A row holds several printed values if rows of the paper were merged.
    """
    above, below = ([paper.get(benchmark, math.nan) for paper in row.settings.paper] for row in (higher, lower))
    return float(np.min(above) - np.max(below))
