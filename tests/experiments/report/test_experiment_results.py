"""Tests of matching records to table rows, and of comparing rows."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.config import rows
from experiments.records.files import Records
from experiments.report.experiment_results import OTHER_FILES, ExperimentResults, match_results
from experiments.report.experiment_specs import ExperimentSpec, load_specs
from experiments.report.run_groups import group_runs
from experiments.report.statistics import paired_test

RecordList = list[dict[str, Any]]
TABLE6 = next(table for table in load_specs() if table.name == "table6_prefusion")


def match(spec: ExperimentSpec, records: RecordList, requested: bool = False) -> ExperimentResults | None:
    parts = (tuple(r for r in records if r["status"] == status) for status in ("finished", "failed"))
    return match_results(spec, group_runs(Records(*parts, (), ())), requested)


def match_required(spec: ExperimentSpec, records: RecordList) -> ExperimentResults:
    found = match(spec, records)
    assert found is not None
    return found


def with_outcomes(record: dict[str, Any], right: str) -> dict[str, Any]:
    changed = copy.deepcopy(record)
    changed["accuracy"] = {"image": right}
    changed["data"] |= {"examples": len(right), "kinds": ["place"] * len(right), "guess": None}
    return changed


def test_match_results_records_fill_rows_with_their_settings(spec: ExperimentSpec, table_records: RecordList) -> None:
    study = match_required(spec, table_records)
    assert [row.label for row in study.rows] == [
        "LLaVA",
        "1 token / 4 tokens",
        "16 tokens",
        "64 tokens",
        "2 layers",
        "2 layers, 50% | average",
    ]
    assert [row.status for row in study.rows] == ["finished"] * 3 + ["not run", "finished", "failed"]
    assert [row.missing_seeds for row in study.rows] == [(), (), (), (0, 1, 2), (2,), ()]
    for row, (compressor, size, layers) in zip(
        study.finished_rows, (("none", 6, 0), ("query", 1, 0), ("query", 2, 0), ("query", 1, 2)), strict=True
    ):
        assert row.runs is not None
        for record in row.runs.records:
            config = record["config"]
            found = config["compressor"]["name"], config["compressor"]["size"], config["prefusion"]["layers"]
            assert found == (compressor, size, layers)
    wanted = [r["accuracy"]["image"] for r in table_records[3:6]]
    assert ["".join(map(str, seed)) for seed in study.rows[1].outcomes] == wanted


@settings(max_examples=30)
@given(st.integers(2, 48))
def test_resolve_rows_any_grid_gives_each_setting_one_row(grid: int) -> None:
    sizes = {1: 1} | {c: round(math.exp(math.log(grid) * math.log(c) / math.log(24))) for c in (4, 8, 12)}
    wanted = {
        ("none", 1, 0),
        *(("query", size, 0) for size in sizes.values()),
        *(("query", 1, n) for n in (1, 2, 3, 4)),
    }
    found = TABLE6.resolve_rows({"model.grid": grid, "seed": 0})
    assert {tuple(row.values.values()) for row in found} == wanted
    assert len(found) == len(wanted)
    assert sum(len(row.paper) for row in found) == len(TABLE6.rows) == 9


def test_match_results_other_settings_form_an_excluded_family(spec: ExperimentSpec, table_records: RecordList) -> None:
    longer = [copy.deepcopy(record) for record in table_records[:6]]
    for record in longer:
        record["config"]["train"]["max_steps"] = 400
        record["id"] = "f" + record["id"][1:]
        record["provenance"]["started"] = "2026-12-01T10:00:00"
    study = match_required(spec, [*table_records, *longer])
    assert study.excluded_families == ("train.max_steps=400",)
    assert {record["config"]["train"]["max_steps"] for record in study.records} == {200}
    # of families with equally many finished runs, the newest
    study = match_required(spec, [*table_records[:6], *longer])
    assert {record["config"]["train"]["max_steps"] for record in study.records} == {400}
    assert study.excluded_families == ("train.max_steps=200",)


def test_match_results_other_data_form_an_excluded_family(spec: ExperimentSpec, table_records: RecordList) -> None:
    for record in table_records[6:9]:
        record["data"]["fingerprint"] = "other"
    study = match_required(spec, table_records)
    assert [row.status for row in study.rows[:3]] == ["finished", "finished", "not run"]
    assert study.excluded_families == ("the same settings on other data",)


def with_files(record: dict[str, Any], version: str) -> dict[str, Any]:
    """Return a record whose model was read from files with a hash."""
    changed = copy.deepcopy(record)
    changed["config"]["model"]["path"], changed["model"]["files"] = "mdl", {"model.path": version * 16}
    return changed


def test_match_results_never_takes_other_files_of_the_model_as_a_seed(
    spec: ExperimentSpec, table_records: RecordList
) -> None:
    """The model was trained again after the first seed of the first row."""
    files = ["a", "b", "b", "b"]
    records = [with_files(table_records[n], version) for n, version in zip((0, 1, 3, 4), files, strict=True)]
    study = match_required(spec, records)
    assert [record["id"] for record in study.records] == [record["id"] for record in records[1:]]
    assert study.rows[0].outcomes.shape[0] == 1
    assert study.excluded_families == (OTHER_FILES,)
    # also where the older files have the newest record of a row
    records[0]["provenance"]["started"] = "2026-12-01T10:00:00"
    assert [r["model"]["files"] for r in match_required(spec, records).records] == [{"model.path": "b" * 16}] * 3


def test_group_names_tell_versions_of_the_models_files_apart(table_records: RecordList) -> None:
    records = (with_files(table_records[0], "a"), with_files(table_records[1], "b"))
    groups = group_runs(Records(records, (), (), ()))
    assert [group.settings for group in groups] == ["files of model.path=aaaaaaaa", "files of model.path=bbbbbbbb"]
    assert len({group.family for group in groups}) == 2


def test_group_names_tell_versions_of_the_data_apart(table_records: RecordList) -> None:
    other = copy.deepcopy(table_records[0])
    other["data"]["fingerprint"] = "other"
    groups = group_runs(Records((table_records[0], other, table_records[3]), (), (), ()))
    assert sorted(group.settings for group in groups) == ["", "data c0ffee12", "data other"]


def test_match_results_rows_that_name_data_settings_share_a_family(
    spec: ExperimentSpec, table_records: RecordList
) -> None:
    about = ExperimentSpec(
        "frames",
        "Frames?",
        tuple(rows.TableRow(str(count), {"data.frames": count}) for count in (8, 0)),
    )
    made = []
    for index, record in enumerate((table_records[0], table_records[1], copy.deepcopy(table_records[0]))):
        record["config"]["data"]["frames"] = 8 if index < 2 else 0
        record["experiment"], record["data"]["fingerprint"] = "frames", f"frames {index // 2}"
        record["id"] = f"{index:016x}"
        made.append(record)
    study = match_required(about, made)
    assert [row.status for row in study.rows] == ["finished", "finished"]
    assert study.comparable(*study.rows)


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({}, True),
        ({"answers": list("abXY")}, True),  # right are questions 0 and 1 in both
        ({"answers": list("aXcd")}, False),
        ({"kinds": ["place", "place", "place", "count"]}, False),
        ({"guess": "0110"}, False),
        ({"guess": "0110", "path": "other.json"}, True),  # another training split gives other guesses
    ],
)
def test_comparable_rows_of_other_data_pair_questions_unless_records_contradict_it(
    table_records: RecordList, changes: dict[str, Any], same: bool
) -> None:
    about = ExperimentSpec("files", "", tuple(rows.TableRow(name, {"data.test_path": name}) for name in ("a", "b")))
    made = [with_outcomes(record, right) for record, right in zip(table_records[:2], ("1100", "1101"), strict=True)]
    for number, record in enumerate(made):
        record["id"], record["experiment"], record["data"]["fingerprint"] = f"{number:016x}", "files", f"data {number}"
        record["config"]["data"] |= {"test_path": "ab"[number], "path": "train.json"}
        record["config"]["seed"], record["answers"], record["data"]["guess"] = 0, list("abcd"), "0101"
    made[1]["config"]["data"]["path"] = changes.pop("path", "train.json")
    made[1]["answers"] = changes.pop("answers", list("abcd"))
    made[1]["data"] |= changes
    if made[1]["config"]["data"]["path"] != "train.json":
        about = ExperimentSpec(
            "files",
            "",
            tuple(
                rows.TableRow(n, {"data.test_path": n, "data.path": p})
                for n, p in zip("ab", ("train.json", "other.json"), strict=True)
            ),
        )
    study = match_required(about, made)
    assert study.comparable(*study.rows) == same
    assert (study.holm_p_values([study.rows]) == [None]) != same


def test_match_results_requires_own_record_or_all_rows_finished(
    spec: ExperimentSpec, table_records: RecordList
) -> None:
    for record in table_records:
        record["experiment"] = record["config"]["name"] = "table61_other"
    assert match(spec, table_records) is None
    assert match(spec, table_records, requested=True) is not None
    table_records[0]["experiment"] = "table60_mixed"
    assert match(spec, table_records) is not None
    short = ExperimentSpec(spec.name, spec.title, spec.rows[1:4])
    assert match(short, table_records[3:]) is not None  # all its rows are finished
    assert match(short, []) is None


def test_match_results_configuration_without_grid_gives_none(spec: ExperimentSpec, table_records: RecordList) -> None:
    for record in table_records:
        del record["config"]["model"]["grid"]
    assert match(spec, table_records, requested=True) is None


def test_difference_swapped_or_reordered_rows_agree(spec: ExperimentSpec, table_records: RecordList) -> None:
    study = match_required(spec, table_records)
    turned = match_required(ExperimentSpec(spec.name, "", spec.rows[::-1]), table_records)
    first, second = study.rows[0], study.rows[2]
    mean, low, high = study.difference(first, second)
    assert mean == pytest.approx(first.outcomes.mean() - second.outcomes.mean())
    assert low < mean < high
    assert study.difference(second, first) == (-mean, -high, -low)
    again = {row.label: row for row in turned.rows}
    assert turned.difference(again["LLaVA"], again["16 tokens"]) == (mean, low, high)


def test_holm_p_values_correct_for_comparable_pairs(spec: ExperimentSpec, table_records: RecordList) -> None:
    study = match_required(spec, table_records)
    pairs = [(row, study.rows[0]) for row in study.rows[1:]]
    found = study.holm_p_values(pairs)
    raw = sorted(paired_test(row.outcomes, study.rows[0].outcomes) for row in study.finished_rows[1:])
    stepped = [min(1.0, max(p * (3 - i) for i, p in enumerate(raw[: n + 1]))) for n in range(3)]
    assert sorted(p for p in found if p is not None) == pytest.approx(stepped)
    assert [p is None for p in found] == [False, False, True, False, True]


def rows_with_counts(table_records: RecordList, *rates: tuple[int, ...]) -> RecordList:
    """Make rows of 100 questions with given numbers of right answers, one for each seed; right answers come first."""
    made = []
    for number, counts in enumerate(rates):
        for seed, count in enumerate(counts):
            record = with_outcomes(table_records[3 * number + seed], "1" * count + "0" * (100 - count))
            made.append(record)
    return made


def test_best_row_must_beat_every_other_row(spec: ExperimentSpec, table_records: RecordList) -> None:
    study = match_required(spec, rows_with_counts(table_records, (60,), (80,), (40,)))
    assert study.best_row is study.rows[1]
    assert (
        match_required(spec, rows_with_counts(table_records, (60,), (80,), (77,))).best_row is None
    )  # McNemar's p is 0.25
    assert match_required(spec, rows_with_counts(table_records, (60,), (80,), (80,))).best_row is None
    assert match_required(spec, rows_with_counts(table_records, (60,))).best_row is None


def test_best_row_disagreeing_seeds_give_none(spec: ExperimentSpec, table_records: RecordList) -> None:
    apart = match_required(spec, rows_with_counts(table_records, (50, 50, 50), (44, 57, 70)))
    first, second = apart.rows[1], apart.rows[0]
    assert apart.p_value(first, second) < 0.01  # significant for these models on other questions
    assert apart.difference(first, second).low < 0  # but not for other seeds
    assert apart.best_row is None


def test_comparable_unequal_numbers_of_questions_is_false(spec: ExperimentSpec, table_records: RecordList) -> None:
    made = rows_with_counts(table_records, (60,), (80,))
    made[1] = with_outcomes(made[1], "1" * 50)
    for record in made:
        record["data"]["fingerprint"] = "the same"
    study = match_required(spec, made)
    assert not study.comparable(*study.rows[:2])
    assert study.holm_p_values([(study.rows[1], study.rows[0])]) == [None]
    assert study.best_row is None


def test_difference_matches_bootstrap_written_as_a_loop(spec: ExperimentSpec, table_records: RecordList) -> None:
    study = match_required(spec, table_records)
    first, second = (row.outcomes for row in study.rows[:2])
    rng = np.random.default_rng(3)
    draws = []
    for _ in range(4000):
        drawn = rng.integers(120, size=120)  # the same questions for both
        ours, theirs = (matrix[rng.integers(3, size=3)][:, drawn].mean() for matrix in (first, second))
        draws.append(ours - theirs)
    found = study.difference(*study.rows[:2])
    np.testing.assert_allclose(found[1:], np.quantile(draws, (0.025, 0.975)), atol=0.012)


def test_match_results_settings_chosen_by_a_budget_share_a_family(table_records: RecordList) -> None:
    spec = ExperimentSpec(
        "equal",
        "Equal FLOPs.",
        tuple(rows.TableRow(name, {"budget.method": name}) for name in ("none", "query", "fastv")),
    )
    chosen = {"none": ("none", 1, []), "query": ("query", 3, []), "fastv": ("none", 1, [2])}
    made = []
    for method, (compressor, size, layers) in chosen.items():
        record = copy.deepcopy(table_records[0])
        record["id"], record["experiment"] = f"{len(made):016x}", "equal"
        record["config"] |= {
            "budget": {"method": method, "share": 0.6},
            "compressor": {"name": compressor, "size": size},
            "reduction": {"name": "none", "layers": layers},
        }
        made.append(record)
    assert [row.status for row in match_required(spec, made).rows] == ["finished"] * 3
    assert not match_required(spec, made).excluded_families
