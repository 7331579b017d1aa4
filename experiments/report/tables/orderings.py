"""TODO"""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pandas as pd

from experiments.report.experiment_results import RULE, Row, Study
from experiments.report.formatting import p_text, percent, signed
from experiments.report.tables.experiment_rows import BENCHMARKS, _where
from experiments.report.tables.table import Table, bounds

HOLDS, REVERSED, UNTOLD = "holds", "does not hold", "cannot be told"


def orderings_table(study: Study) -> Table | None:
    """For every two rows that the paper orders alike on all of `BENCHMARKS`: whether they are so ordered here.

    An ordering holds if the rows differ by `RULE` with its p-value corrected (Holm) for the number of pairs, and in
    the paper's direction; it does not hold if they so differ in the other; else it cannot be told. None where the paper
    orders no two rows.
    """
    pairs = [pair for two in combinations(study.rows, 2) if (pair := _paper_order(*two)) is not None]
    if not pairs:
        return None
    data, text = [], []
    for (higher, lower), p_value in zip(pairs, study.p_corrected(pairs), strict=True):
        difference = None if p_value is None else study.difference(higher, lower)
        answer = UNTOLD
        if p_value is not None and difference is not None and study.differ(higher, lower, p_value):
            answer = HOLDS if difference.mean > 0 else REVERSED
        why = next((row.state for row in (higher, lower) if not row.finished), "other questions")
        margins = {name: _margin(higher, lower, name) for name in BENCHMARKS}
        data.append(
            {
                "higher": higher.label,
                "lower": lower.label,
                **{f"paper_{name}": margin for name, margin in margins.items()},
                **bounds("difference", difference),
                "p_holm": p_value,
                "answer": answer,
            }
        )
        text.append(
            {
                "Higher in the paper": higher.label,
                "Lower": lower.label,
                **{f"Paper, {BENCHMARKS[name]}": signed(margin) for name, margin in margins.items()},
                "Here": percent(difference, sign=True) if difference else why,
                "p": p_text(p_value) if p_value is not None else why,
                "Ordering": answer,
            }
        )
    frame = pd.DataFrame(data)
    counts = {answer: int((frame["answer"] == answer).sum()) for answer in (HOLDS, REVERSED, UNTOLD)}
    one = [row.label for row in study.rows if len(row.setting.paper) > 1]
    notes = (
        f"Percentage points. An ordering holds, or does not, where the two rows differ here by the rule: {RULE}; p is "
        "Holm-corrected for the number of pairs. The paper gives no intervals: its order is taken as printed.",
        *([f"Not among the pairs, since they are one row on this model: {'; '.join(one)}."] if one else []),
    )
    caption = (
        f"{study.definition.title} Of the {len(pairs)} pairs of rows that the paper orders alike on "
        f"{', '.join(BENCHMARKS.values())}, here ({_where(study)}): "
        + "; ".join(f"{answer}: {count}" for answer, count in counts.items())
        + "."
    )
    numeric = tuple(column for column in text[0] if column not in ("Higher in the paper", "Lower", "Ordering"))
    return Table(f"{study.name}_orderings", caption, frame, pd.DataFrame(text), numeric, notes)


def _paper_order(first: Row, second: Row) -> tuple[Row, Row] | None:
    """The two rows, the higher first, if the paper has the same one higher on every benchmark."""
    for higher, lower in ((first, second), (second, first)):
        if all(_margin(higher, lower, name) > 0 for name in BENCHMARKS):
            return higher, lower
    return None


def _margin(higher: Row, lower: Row, name: str) -> float:
    """By how much the paper has one row above another at least, where several coincide; NaN where it does not print it."""
    above, below = ([paper.get(name, math.nan) for paper in row.setting.paper] for row in (higher, lower))
    return float(np.min(above) - np.max(below))
