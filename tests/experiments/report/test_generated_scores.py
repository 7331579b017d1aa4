"""Scores of generated answers in reports, and which published scores stand beside them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import permutation_test

from experiments.records.files import Records
from experiments.report import tables
from experiments.report.experiment_specs import ExperimentSpec
from experiments.report.results import Report
from experiments.report.statistics import paired_test
from tests.experiments.report.test_experiment_row_tables import study

RecordList = list[dict[str, Any]]
SCORES = np.array([0, 0.3, 0.6, 0.9, 1])


def add_generated(record: dict[str, Any], metric: str = "vqa", references: int = 10, shift: float = 0) -> None:
    """Add drawn scores to a finished record; a higher `shift` makes them higher on the same questions."""
    if record["status"] == "failed":
        return
    rng, examples = np.random.default_rng(3), record["data"]["examples"]
    views = {}
    for name, worse in (("image", 0.0), ("blank", 0.6)):
        level = np.clip(rng.random(examples) + shift - worse, 0, 0.999)
        scores = SCORES[(level * 5).astype(int)] if references > 1 else (level > 0.5).astype(float)
        views[name] = {"answers": ["cat"] * examples, "scores": scores.tolist()}
    record["generated"] = {"metric": metric, "references": references, "max_new_tokens": 16, **views}


def experiment_table(spec: ExperimentSpec, records: RecordList) -> tables.Table:
    return tables.experiment_tables([study(spec, records)])[0]


def test_paired_test_of_scores_in_tenths_equals_scipy_over_all_signs() -> None:
    rng = np.random.default_rng(0)
    for trial in range(20):
        first, second = rng.choice(10 * SCORES, (2, 1, 9)).astype(int)
        if trial % 2:
            first = np.concatenate([first, rng.choice(10 * SCORES, (1, 9)).astype(int)])  # two seeds
        for alternative in ("two-sided", "greater"):
            expected = permutation_test(
                (first.sum(0) / len(first), second.sum(0) / len(second)),
                lambda a, b: np.sum(a - b),
                permutation_type="samples",
                alternative=alternative,
                n_resamples=np.inf,
            )
            assert paired_test(first, second, alternative) == pytest.approx(expected.pvalue)


def test_experiment_table_has_scores_with_their_difference_from_the_first_row(
    spec: ExperimentSpec, table_records: RecordList
) -> None:
    for record in table_records:
        add_generated(record, shift=0.2 if record["config"]["compressor"]["name"] == "none" else 0)
    table = experiment_table(spec, table_records)
    data, done = table.data, (table.data["status"] == "finished").to_numpy()
    with_llava, others = (
        np.mean(
            next(r for r in table_records if r["config"]["compressor"]["name"] == name)["generated"]["image"]["scores"]
        )
        for name in ("none", "query")
    )
    assert done[0]
    np.testing.assert_allclose(data["generated_score"][done], [with_llava, *[others] * (done.sum() - 1)])
    assert data["generated_score_low"][0] < with_llava < data["generated_score_high"][0]
    assert np.isnan(data["generated_difference"][0])
    np.testing.assert_allclose(data["generated_difference"][done][1:], others - with_llava)
    assert (data["generated_p_holm"][done][1:] < 1e-6).all()  # the first row is nowhere lower
    assert {"VQA accuracy (generated) (%)", "Difference (generated)", "p (generated)"} <= set(table.text)
    assert any(note.startswith("VQA accuracy (generated): ") and "16 tokens" in note for note in table.notes)


def test_experiment_table_without_generated_answers_has_no_column_of_them(
    spec: ExperimentSpec, table_records: RecordList
) -> None:
    table = experiment_table(spec, table_records)
    assert not any("generated" in column for column in [*table.text, *table.data])


@pytest.mark.parametrize(
    ("data", "metric", "references", "printed"),
    [
        ("vqav2", "vqa", 10, True),
        ("VQAv2", "vqa", 10, True),
        ("vqav2", "vqa", 1, False),  # one reference is not VQAv2's metric
        ("vqav2", "gqa", 1, False),
        ("gqa", "gqa", 1, True),
        ("gqa", "vqa", 1, False),
        ("mmb", "gqa", 1, False),  # MMBench rotates the options
        ("mmb", "vqa", 10, False),
        ("shapes", "vqa", 10, False),
        ("vqav2", None, 0, False),  # teacher-forced exact match alone
    ],
)
def test_published_scores_stand_beside_their_benchmarks_own_metric_alone(
    spec: ExperimentSpec, table_records: RecordList, data: str, metric: str | None, references: int, printed: bool
) -> None:
    for record in table_records:
        record["config"]["data"]["name"] = data
        if metric is not None:
            add_generated(record, metric, references)
    table = experiment_table(spec, table_records)
    paper = [column for column in [*table.text, *table.data] if "paper" in column.lower()]
    if not printed:
        assert not paper
        return
    name = data.lower()
    title = {"vqav2": "VQAv2", "gqa": "GQA"}[name]
    assert paper == [f"Paper, {title}", f"paper_{name}"]
    first = {"vqav2": 78.5, "gqa": 62.0}[name]
    assert (table.data[f"paper_{name}"][0], table.text[f"Paper, {title}"][0]) == (first, f"{first}")
    # One row stands for two of the paper, and one is not printed there.
    assert [
        row for row, value in zip(table.data["row"], table.data[f"paper_{name}"], strict=True) if np.isnan(value)
    ] == [
        *("1 token / 4 tokens", "2 layers, 50% | average"),
    ]


def test_published_scores_are_absent_if_one_record_lacks_the_metric(
    spec: ExperimentSpec, table_records: RecordList
) -> None:
    for record in table_records:
        record["config"]["data"]["name"] = "vqav2"
        add_generated(record)
    del next(record for record in table_records[::-1] if record["status"] == "finished")["generated"]
    assert not any("paper" in column.lower() for column in experiment_table(spec, table_records).text)


def test_generated_scores_table_has_the_blind_controls_of_every_group(records: RecordList) -> None:
    for record in records:
        if record["status"] == "finished" and record["model"]["compressor"] != "average":
            add_generated(record)
    finished, failed = (tuple(r for r in records if r["status"] == status) for status in ("finished", "failed"))
    report = Report(Records(finished, failed, (), ()), specs=())
    table = report.tables["generated_scores"]
    groups = {record["model"]["compressor"] for record in finished} - {"average"}
    assert {"none", "query"} == groups
    assert set(table.data["control"]) == {"blank"}
    scored = [record for record in finished if "generated" in record]
    blank = np.mean(scored[0]["generated"]["blank"]["scores"])
    image = np.mean(scored[0]["generated"]["image"]["scores"])
    np.testing.assert_allclose(table.data["difference"], image - blank)
    np.testing.assert_allclose(table.data["without"], blank)
    ablation = report.tables["ablation"].data
    compared = ablation["model"].str.startswith("LLaVA-Mini") & (ablation["compressor"] == "query")
    np.testing.assert_allclose(ablation["generated_difference"][compared], 0, atol=1e-12)
    assert (ablation["generated_p_holm"][compared] == 1).all()
    assert ablation["generated_score"][ablation["compressor"] == "average"].isna().all()
