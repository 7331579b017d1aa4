"""Rows that were still improving, and learning curves."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.records.files import Records
from experiments.report import figures, html
from experiments.report.experiment_results import ExperimentResults, match_results
from experiments.report.experiment_specs import ExperimentSpec
from experiments.report.figure_entries import CURVES_SUFFIX
from experiments.report.figures.learning_curves import learning_curve
from experiments.report.results import Report
from experiments.report.run_groups import group_runs
from experiments.report.tables.experiment_rows import experiment_table
from experiments.report.tables.orderings import orderings_table
from experiments.report.training_ends import describe_training

RecordList = list[dict[str, Any]]
FEW = "1 token / 4 tokens"  # two rows with the same settings


def study(spec: ExperimentSpec, records: RecordList) -> ExperimentResults:
    found = match_results(spec, group_runs(Records(tuple(records), (), (), ())))
    assert found is not None
    return found


def trained(record: dict[str, Any], stopped: str, accuracies: list[float], every: int = 30) -> dict[str, Any]:
    """Return a record whose training until a plateau has this learning curve."""
    record = copy.deepcopy(record)
    record["config"]["train"]["until"] = "plateau"
    curve = [
        {"step": every * (i + 1), "accuracy": a, "loss": 1 - a, "learning_rate": 1e-3} for i, a in enumerate(accuracies)
    ]
    log = [{"loss": 1.0, "step": 10}, {"step": every * len(accuracies)}]
    record["train"] = {"log": log, "steps": every * len(accuracies), "stopped": stopped, "validation": curve}
    return record


@pytest.fixture
def three_rows(table_records: RecordList) -> RecordList:
    """LLaVA (two seeds), 1 token and 16 tokens, with clearly different accuracies and training until a plateau."""
    chosen = [(0, "plateau", [0.4, 0.5, 0.6]), (1, "plateau", [0.3, 0.4]), (3, "max_steps", [0.2, 0.3, 0.4, 0.5])]
    chosen.append((6, "plateau", [0.5, 0.7]))
    records = [trained(table_records[index], stopped, accuracies) for index, stopped, accuracies in chosen]
    for record, right in zip(records, (60, 60, 30, 90), strict=True):
        record["accuracy"] = {"image": "1" * right + "0" * (120 - right)}
    return records


def orderings(spec: ExperimentSpec, records: RecordList) -> dict[tuple[str, str], str]:
    table = orderings_table(study(spec, records))
    assert table is not None
    return {(row.higher, row.lower): row.answer for row in table.data.itertuples()}


def test_orderings_table_does_not_judge_a_row_that_was_still_improving(
    spec: ExperimentSpec, three_rows: RecordList
) -> None:
    found = orderings(spec, three_rows)
    assert found["LLaVA", FEW] == "cannot be told (still improving)"
    assert found["16 tokens", FEW] == "cannot be told (still improving)"
    assert found["LLaVA", "16 tokens"] == "does not hold"
    assert found["LLaVA", "64 tokens"] == "cannot be told"  # not run
    three_rows[2]["train"]["stopped"] = "plateau"
    assert orderings(spec, three_rows)["LLaVA", FEW] == "holds"


def test_orderings_table_of_a_row_with_one_seed_still_improving_is_not_judged(
    spec: ExperimentSpec, three_rows: RecordList
) -> None:
    three_rows[2]["train"]["stopped"] = "plateau"
    three_rows[1]["train"]["stopped"] = "max_steps"
    found = orderings(spec, three_rows)
    assert found["LLaVA", "16 tokens"] == found["LLaVA", FEW] == "cannot be told (still improving)"
    assert found["16 tokens", FEW] == "holds"


def test_orderings_table_corrects_p_values_for_the_judged_pairs_alone(
    spec: ExperimentSpec, three_rows: RecordList
) -> None:
    """Of three pairs one is judged, so its p-value is that of the one test: 2 / 2^6 of six questions."""
    three_rows = [three_rows[0], *three_rows[2:]]
    three_rows[2]["accuracy"] = {"image": "1" * 66 + "0" * 54}
    table = orderings_table(study(spec, three_rows))
    assert table is not None
    judged = table.data.dropna(subset=["p_holm"])
    assert judged["p_holm"].tolist() == pytest.approx([2 / 64])
    assert "cannot be told (still improving): 2" in table.caption


def test_experiment_table_marks_a_row_that_was_still_improving(spec: ExperimentSpec, three_rows: RecordList) -> None:
    table = experiment_table(study(spec, three_rows))
    ends = dict(zip(table.text["Row"], table.text["Trained until"], strict=True))
    assert ends["LLaVA"] == "plateau, 75 steps"  # mean of 90 and 60
    assert ends[FEW] == "120 steps, still improving"
    assert ends["16 tokens"] == "plateau, 60 steps"
    assert ends["64 tokens"] == "not run"
    improving = dict(zip(table.data["row"], table.data["still_improving"], strict=True))
    assert [row for row, value in improving.items() if value] == [FEW]
    assert table.bold == frozenset()
    assert any(f"No row is bold here, because rows were still improving: {FEW}" in note for note in table.notes)
    three_rows[2]["train"]["stopped"] = "plateau"
    assert experiment_table(study(spec, three_rows)).bold


def test_experiment_table_of_fixed_lengths_has_no_training_column(
    spec: ExperimentSpec, table_records: RecordList
) -> None:
    for record in table_records[:9]:
        record["train"] = {"log": [{"loss": 1.0, "step": 10}, {"step": 200}]}
    results = study(spec, table_records[:9])
    table, ordered = experiment_table(results), orderings_table(results)
    assert ordered is not None
    assert "Trained until" not in table.text
    assert "still_improving" not in table.data
    assert ordered.caption.endswith("Training was of fixed length, so rows may still improve.")


def test_describe_training_of_mixed_records_counts_each_end(three_rows: RecordList, table_records: RecordList) -> None:
    fixed = {**table_records[2], "train": {"log": [{"step": 200}]}}
    untrained = {**table_records[2], "train": None}
    text = describe_training([*three_rows, fixed, untrained])
    assert "in 3 of 5 runs" in text
    assert "1 were still improving" in text
    assert "1 were of fixed length" in text
    assert describe_training([untrained]) == ""


def test_learning_curve_keeps_the_last_value_of_a_seed_that_ended_earlier(three_rows: RecordList) -> None:
    later = trained(three_rows[0], "plateau", [0.1, 0.2], every=45)
    curve = learning_curve([three_rows[0], three_rows[1], later], "accuracy")
    assert curve.steps.tolist() == [30, 45, 60, 90]
    assert curve.values.tolist() == [[0.4, 0.4, 0.5, 0.6], [0.3, 0.3, 0.4, 0.4], [0.1, 0.1, 0.1, 0.2]]


def test_learning_curves_figure_draws_means_ranges_and_open_markers(
    spec: ExperimentSpec, three_rows: RecordList
) -> None:
    figure = figures.learning_curves_figure(study(spec, three_rows))
    accuracy, loss = figure.axes
    lines = {str(line.get_label()): line for line in accuracy.get_lines()}
    assert set(lines) == {"LLaVA", FEW, "16 tokens"}
    np.testing.assert_allclose(lines["LLaVA"].get_xydata(), [[30, 35], [60, 45], [90, 50]])
    np.testing.assert_allclose(loss.get_lines()[0].get_ydata(), [0.65, 0.55, 0.5])
    assert [label for label, line in lines.items() if line.get_markerfacecolor() == "white"] == [FEW]
    band = accuracy.collections[0].get_paths()[0].get_extents()
    assert (band.ymin, band.ymax) == pytest.approx((30, 60))


def test_report_shows_the_learning_curves_beside_the_table(
    spec: ExperimentSpec, three_rows: RecordList, tmp_path: Path
) -> None:
    report = Report(Records(tuple(three_rows), (), (), ()), specs=[spec])
    stem = f"{spec.name}{CURVES_SUFFIX}"
    entry = next(entry for entry in report.figures if entry.stem == stem)
    assert f"{FEW} 50.0 (120 steps, still improving)" in entry.caption
    assert entry.draw is not None
    png, _ = figures.save(entry.draw(), tmp_path / stem)
    images = {e.stem: png for e in report.figures if e.draw}
    page = html.render_page(report, images)
    assert page.index(f"figures/{stem}.pdf") < page.index(f"tables/{spec.name}.csv")
    assert f'alt="Learning curves: {spec.name}. Accuracy (teacher-forced exact match) and loss' in page


def test_rows_without_curves_have_no_learning_curve_figure(spec: ExperimentSpec, table_records: RecordList) -> None:
    results = study(spec, table_records[:9])
    with pytest.raises(ValueError, match=spec.name):
        figures.learning_curves_figure(results)
    report = Report(Records(tuple(table_records[:9]), (), (), ()), specs=[spec])
    assert not any(entry.stem.endswith(CURVES_SUFFIX) for entry in report.figures)
