"""Comparison of reducers with the uncut model: the share of its score that is left, and how often the answer is the same."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Integer

from experiments.records.views import Record, parse_outcomes, record_seed
from experiments.report.experiment_results import ExperimentResults, ResultRow
from experiments.report.formatting import NONE, format_interval
from experiments.report.statistics import Interval, accuracy_interval
from experiments.report.tables.table import Table, interval_columns, with_columns

UNCUT_NOTE = (
    "Relative score: accuracy as a share of the first row's, mean over the question types and the seeds; types that the "
    "first row never answers right are left out. Same answers: share of the questions that are answered as by the first "
    "row, with its 95% bootstrap interval. Answers are compared up to the first token that is not in the right answer."
)


def with_uncut_columns(table: Table, results: ExperimentResults) -> Table:
    """Return an experiment's table with columns for the relative score and the same answers, where they are defined.

    Args:
        table: The table, with one row for each of the experiment's rows.
        results: The experiment's rows with their runs.
    """
    if not compares_with_uncut(results):
        return table
    uncut, data, text = results.rows[0], [], []
    for row in results.rows:
        score, alike = (relative_score(row, uncut), same_answers(row, uncut)) if row.finished else (None, None)
        data.append({"relative_score": score, **interval_columns("same_answers", alike)})
        missing = NONE if row.finished else row.status
        text.append(
            {
                "Relative score (%)": missing if score is None else f"{100 * score:.1f}",
                "Same answers (%)": missing if alike is None else format_interval(alike),
            }
        )
    return with_columns(table, data, text, UNCUT_NOTE)


def compares_with_uncut(results: ExperimentResults) -> bool:
    """Return whether all rows are one model without training, so that its answers can be compared with the first row's."""
    records = [record for row in results.finished_rows if row.runs for record in row.runs.finished]
    untrained = all(record.get("train") is None and record.get("answers") is not None for record in records)
    return untrained and results.rows[0].finished and len(results.finished_rows) > 1


def relative_score(row: ResultRow, uncut: ResultRow) -> float | None:
    """Return the mean over question types and seeds of the row's accuracy divided by the uncut model's.

    Args:
        row: A finished row.
        uncut: The row of the uncut model.

    Returns:
        The mean ratio; None if the rows have different questions, or the uncut model answers nothing right.
    """
    ratios = []
    for record, other in _pairs(row, uncut):
        kinds = np.array(record["data"]["kinds"])
        right, right_uncut = (parse_outcomes(r["accuracy"]["image"]) for r in (record, other))
        members = [kinds == kind for kind in sorted(set(kinds.tolist()))]
        by_kind = [right[m].mean() / right_uncut[m].mean() for m in members if right_uncut[m].any()]
        if by_kind:
            ratios.append(float(np.mean(by_kind)))
    return float(np.mean(ratios)) if ratios else None


def same_answers(row: ResultRow, uncut: ResultRow) -> Interval | None:
    """Return the share of questions that both rows answer alike, with a 95% interval over examples and seeds.

    Args:
        row: A finished row.
        uncut: The row of the uncut model.

    Returns:
        The share with its bounds; None if the rows have different questions.
    """
    if row is uncut:  # equal by definition, so no other questions could show anything else
        return Interval(1.0, 1.0, 1.0)
    alike = [_equal(record["answers"], other["answers"]) for record, other in _pairs(row, uncut)]
    return accuracy_interval(np.stack(alike)) if alike else None


def _equal(answers: Sequence[str], others: Sequence[str]) -> Integer[np.ndarray, " examples"]:
    same: Bool[np.ndarray, " examples"] = np.array([a == b for a, b in zip(answers, others, strict=True)])
    return same.astype(int)


def _pairs(row: ResultRow, uncut: ResultRow) -> list[tuple[Record, Record]]:
    """Return each record of the row with the uncut model's of the same seed, or its first, if the questions are the same."""
    if row.runs is None or uncut.runs is None or not uncut.runs.finished:
        return []
    by_seed = {record_seed(record): record for record in uncut.runs.finished}
    pairs = [(record, by_seed.get(record_seed(record), uncut.runs.finished[0])) for record in row.runs.finished]
    same_data = all(a["data"]["fingerprint"] == b["data"]["fingerprint"] for a, b in pairs)
    return pairs if same_data and all(a["data"]["examples"] == b["data"]["examples"] for a, b in pairs) else []
