"""Relative scores and equal answers, against counts by hand."""

from __future__ import annotations

from typing import Any

import pytest

from experiments.records.files import Records
from experiments.report.experiment_results import ExperimentResults, match_results
from experiments.report.experiment_specs import ExperimentSpec
from experiments.report.run_groups import group_runs
from experiments.report.tables import experiment_tables
from experiments.report.tables.uncut_comparison import compares_with_uncut, relative_score, same_answers
from tests.experiments.sample_records import table_record

KINDS = ["colour"] * 4 + ["count"] * 2 + ["place"]


def record(size: int, outcomes: str, answers: str, train: Any = None) -> dict[str, Any]:
    """Return the record of a row; each character of `answers` is the answer to one question."""
    made = table_record("query" if size < 6 else "none", size, 0, 0)
    made["accuracy"] = {"image": outcomes}
    made["data"] |= {"examples": len(outcomes), "kinds": KINDS, "guess": None}
    for part in ("removal", "knockout", "readout", "lens", "attention", "fusion"):
        made.pop(part, None)
    return made | {"answers": list(answers), "train": train}


def study(spec: ExperimentSpec, *records: dict[str, Any]) -> ExperimentResults:
    found = match_results(spec, group_runs(Records(records, (), (), ())))
    assert found is not None
    return found


@pytest.fixture
def results(spec: ExperimentSpec) -> ExperimentResults:
    return study(spec, record(6, "1111100", "abcdeXY"), record(1, "1100010", "abQRSfY"))


def test_relative_score_is_the_mean_ratio_over_question_types(results: ExperimentResults) -> None:
    """Colour 2 of 4 against 4 of 4, count 1 of 2 against 1 of 2; the uncut model never answers place right."""
    uncut, cut = results.finished_rows
    assert relative_score(cut, uncut) == pytest.approx((0.5 + 1.0) / 2)
    assert relative_score(uncut, uncut) == 1


def test_same_answers_counts_equal_answers_also_wrong_ones(results: ExperimentResults) -> None:
    uncut, cut = results.finished_rows
    alike = same_answers(cut, uncut)
    assert alike is not None
    assert alike.mean == pytest.approx(3 / 7)  # a, b and the wrong Y
    assert alike.low <= alike.mean <= alike.high
    assert same_answers(uncut, uncut) == (1, 1, 1)


def test_experiment_table_of_untrained_rows_has_both_columns(results: ExperimentResults) -> None:
    table = experiment_tables([results])[0]
    cells = table.text.set_index("Row")
    assert [value for value in cells["Relative score (%)"] if value != "not run"] == ["100.0", "75.0"]
    assert cells["Same answers (%)"].iloc[0] == "100.0 [100.0, 100.0]"
    assert any("Same answers" in note for note in table.notes)
    assert set(cells.loc[cells["Accuracy (%)"] == "not run", "Same answers (%)"]) == {"not run"}


@pytest.mark.parametrize("change", [{"train": {"log": []}}, {"answers": None}])
def test_compares_with_uncut_of_trained_rows_or_without_answers_is_false(
    spec: ExperimentSpec, change: dict[str, Any]
) -> None:
    results = study(spec, record(6, "1111100", "abcdeXY"), record(1, "1100010", "abQRSfY") | change)
    assert not compares_with_uncut(results)
    assert "Relative score (%)" not in experiment_tables([results])[0].text
