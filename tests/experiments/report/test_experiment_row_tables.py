"""Tests of experiment tables and orderings, against golden files (see test_writers.py) and by property."""

from __future__ import annotations

import copy
import io
import random
import re
from typing import Any

import pandas as pd
import pytest
import yaml

from experiments.records.files import Records
from experiments.report import tables as tables_module
from experiments.report.experiment_results import ExperimentResults, match_results
from experiments.report.experiment_specs import SPEC_FOLDER, ExperimentSpec, load_specs
from experiments.report.run_groups import group_runs
from experiments.report.tables import experiment_rows, writers
from experiments.report.tables.table import Table
from tests.experiments.report.test_writers import GOLDEN, WRITERS
from tests.experiments.sample_records import fail

RecordList = list[dict[str, Any]]
NAMES = ("table60_mixed", "table60_mixed_orderings")


def study(spec: ExperimentSpec, records: RecordList) -> ExperimentResults:
    parts = (tuple(r for r in records if r["status"] == status) for status in ("finished", "failed"))
    found = match_results(spec, group_runs(Records(*parts, (), ())))
    assert found is not None
    return found


def tables(spec: ExperimentSpec, records: RecordList) -> dict[str, Table]:
    return {table.name: table for table in tables_module.experiment_tables([study(spec, records)])}


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("name", NAMES)
def test_tables_match_golden_files(spec: ExperimentSpec, table_records: RecordList, name: str, suffix: str) -> None:
    path, text = GOLDEN / f"{name}.{suffix}", WRITERS[suffix](tables(spec, table_records)[name])
    if not path.exists():
        path.write_text(text, encoding="utf-8")
        pytest.fail(f"{path.name} was missing and has been written; review it and run the test again")
    assert text == path.read_text(encoding="utf-8")


def test_tables_are_independent_of_record_order(spec: ExperimentSpec, table_records: RecordList) -> None:
    made = tables(spec, table_records)
    random.Random(0).shuffle(table_records)
    again = tables(spec, sorted(table_records, key=lambda record: record["id"]))
    for name, table in made.items():
        assert all(write(table) == write(again[name]) for write in WRITERS.values())


@pytest.mark.parametrize("versions", [("a", "b"), ("a", None), ("a", "a"), (None, None)])
def test_experiment_table_notes_several_versions_of_the_models_files(
    spec: ExperimentSpec, table_records: RecordList, versions: tuple[str | None, ...]
) -> None:
    records = table_records[:6]
    for number, record in enumerate(records):
        version = versions[number // 3]
        record["config"]["model"]["path"] = "mdl"
        record["model"]["files"] = version and {"model.path": version * 16}
    notes = [note for note in tables(spec, records)[NAMES[0]].notes if "versions of the model's files" in note]
    assert len(notes) == (versions[0] != versions[1])
    for note in notes:
        assert "model.path=mdl" in note
        assert "aaaaaaaa" in note


def test_experiment_table_names_a_newer_failed_run_and_keeps_the_finished_one(
    spec: ExperimentSpec, table_records: RecordList
) -> None:
    before = tables(spec, table_records[:6])[NAMES[0]]
    made = tables(spec, [*table_records[:6], {**fail(table_records[3]), "id": "f" * 16}])[NAMES[0]]
    assert made.text.equals(before.text)
    (note,) = set(made.notes) - set(before.notes)
    assert "seed 0" in note
    assert "out of memory" in note


@pytest.mark.parametrize("change", ["data", "settings"])
def test_experiment_table_advises_a_setting_only_where_one_differs(
    spec: ExperimentSpec, table_records: RecordList, change: str
) -> None:
    other = copy.deepcopy(table_records[0])
    other["id"] = "f" * 16
    if change == "data":
        other["data"]["fingerprint"] = "other"
    else:
        other["config"]["train"]["max_steps"] = 400
    (note,) = [n for n in tables(spec, [*table_records[:6], other])[NAMES[0]].notes if "left out" in n]
    assert ("add its setting" in note) == (change == "settings")


@pytest.mark.parametrize("name", NAMES)
def test_tables_have_no_blank_cell(spec: ExperimentSpec, table_records: RecordList, name: str) -> None:
    table = tables(spec, table_records)[name]
    cells = table.text.to_numpy().ravel()
    assert all(isinstance(cell, str) and cell.strip() and cell != "nan" for cell in cells)
    back = pd.read_csv(io.StringIO(writers.csv(table)))
    assert back.shape == table.data.shape


def test_experiment_table_incomplete_rows_state_status_and_seeds(
    spec: ExperimentSpec, table_records: RecordList
) -> None:
    table = tables(spec, table_records)["table60_mixed"]
    text = table.text.set_index("Row")
    assert set(text.loc["64 tokens"]) >= {"not run", "0 of 3"}
    assert set(text.loc["2 layers, 50% | average"]) >= {"failed", "0 of 3"}
    assert text.loc["2 layers", "Seeds"] == "1 of 3"
    assert table.incomplete_rows == {3, 5}
    assert "2 layers, seed 1: failed: RuntimeError: out of memory at step 12_000." in table.notes
    assert "2 layers, seed 2: not run." in table.notes
    failed = "failed: RuntimeError: out of memory at step 12_000."
    assert f"2 layers, 50% | average, seeds 0, 1, 2: {failed}" in table.notes
    assert "Not run: 64 tokens." in table.notes


def test_experiment_table_caption_explains_scaled_sizes(spec: ExperimentSpec, table_records: RecordList) -> None:
    caption = tables(spec, table_records)["table60_mixed"].caption
    assert (
        "24 x 24 grid is scaled to this model's 6 x 6 grid by 6^(ln C / ln 24), rounded: 2 to 1, 4 to 2, 8 to 3."
        in caption
    )
    assert "Rows with the same settings on this model are merged: 1 token / 4 tokens." in caption
    assert "shapes, test split, n = 120 questions, 3 seeds, model tiny, cpu (2 threads)" in caption
    for record in table_records:
        record["config"]["model"]["grid"] = 24
        record["config"]["compressor"]["size"] *= 2  # a size of 2 becomes the paper's 4
    assert "is scaled to" not in tables(spec, table_records)["table60_mixed"].caption


def test_scaling_note_tiles_widen_both_grids(table_records: RecordList) -> None:
    table7 = next(spec for spec in load_specs() if spec.name == "table7_tokens")
    note = table7.scaling_note({"model.grid": 6})
    assert note.endswith(
        "rounded: 2 to 1, 4 to 2, 8 to 3; with 2 tiles a side both grids are 2 times as wide: 4 to 2, 8 to 4, 12 to 5, "
        "24 to 8."
    )


def test_experiment_table_best_row_is_bold_in_every_format(spec: ExperimentSpec, table_records: RecordList) -> None:
    table = tables(spec, table_records)["table60_mixed"]
    assert table.bold == {(0, "Accuracy (%)")}
    shown = table.text["Accuracy (%)"][0]
    assert f"| **{shown}** |" in writers.markdown(table)
    assert rf"& \textbf{{{shown}}} &" in writers.latex(table)
    assert list(table.data["best"]) == [True] + [False] * 5
    again = [copy.deepcopy(record) for record in table_records]
    for other, record in zip(again[3:6], table_records[:3], strict=True):
        other["accuracy"] = record["accuracy"]
    table = tables(spec, again)["table60_mixed"]
    assert not table.bold
    assert "**" not in writers.markdown(table).partition("\n")[2]
    note = next(note for note in table.notes if note.startswith("Bold"))
    assert re.search(
        r"the highest, LLaVA, differs by \+0\.0 \[.*\] from the next, 1 token / 4 tokens \(p = 1\.000\)\.$", note
    )


@pytest.mark.parametrize("data", ["shapes", "gqa", "vqav2"])
def test_experiment_table_sets_no_published_score_beside_exact_match(
    spec: ExperimentSpec, table_records: RecordList, data: str
) -> None:
    for record in table_records:
        record["config"]["data"]["name"] = data
    table = tables(spec, table_records)["table60_mixed"]
    assert not any("paper" in column.lower() for column in [*table.text, *table.data])


def paper_orders(rows: list[dict[str, Any]]) -> set[tuple[str, str]]:
    """Return pairs of labels, higher first, by a loop over the YAML."""
    found = set()
    for first in rows:
        for second in rows:
            above = [first["paper"].get(task, 0) > second["paper"].get(task, 1e9) for task in ("vqav2", "gqa", "mmb")]
            if all(above):
                found.add((first["label"], second["label"]))
    return found


@pytest.mark.parametrize("name", ["table6_prefusion", "table8_compression"])
def test_orderings_table_has_all_pairs_that_the_paper_orders(table_records: RecordList, name: str) -> None:
    rows = yaml.safe_load((SPEC_FOLDER / f"{name}.yaml").read_text())["rows"]
    table = next(spec for spec in load_specs() if spec.name == name)
    for record in table_records:
        record["experiment"] = name
        if name == "table8_compression":
            record["config"]["compressor"], record["config"]["prefusion"]["layers"] = {"name": "query", "size": 1}, 4
    found = tables(table, table_records[:6] if name == "table6_prefusion" else table_records[:3])
    data = found[f"{name}_orderings"].data
    assert set(zip(data["higher"], data["lower"], strict=True)) == paper_orders(rows)


def answers(
    spec: ExperimentSpec, table_records: RecordList, rates: dict[int, int], examples: int = 120
) -> dict[tuple[str, str], str]:
    """Return the orderings if the given records (of rows 0, 1 and 2) have these numbers of right answers."""
    made = []
    for index, count in rates.items():
        record = copy.deepcopy(table_records[index])
        record["accuracy"] = {"image": "1" * count + "0" * (examples - count)}
        made.append(record)
    data = tables(spec, made)["table60_mixed_orderings"].data
    return {(row.higher, row.lower): row.answer for row in data.itertuples()}


def test_orderings_table_gives_order_reversed_order_or_neither(spec: ExperimentSpec, table_records: RecordList) -> None:
    few = "1 token / 4 tokens"
    found = answers(spec, table_records, {0: 60, 3: 30, 6: 90})
    assert found["LLaVA", few] == "holds"
    assert found["LLaVA", "16 tokens"] == "does not hold"
    assert found["16 tokens", few] == "holds"
    assert found["LLaVA", "64 tokens"] == "cannot be told"  # not run
    found = answers(spec, table_records, {0: 60, 3: 57, 6: 90})
    assert found["LLaVA", few] == "cannot be told"  # 3 questions differ: McNemar's p is 0.25
    assert found["16 tokens", few] == "holds"


def test_orderings_table_p_values_are_corrected_for_pairs(spec: ExperimentSpec, table_records: RecordList) -> None:
    few = "1 token / 4 tokens"
    # Three pairs are compared. McNemar's p is 2 / 2^k for k questions of which all go one way.
    found = answers(spec, table_records, {0: 60, 3: 52, 6: 60})
    assert found["LLaVA", few] == "holds"  # 3 x 2 / 256
    found = answers(spec, table_records, {0: 60, 3: 54, 6: 60})
    assert found["LLaVA", few] == "cannot be told"  # 2 / 64 alone is below 0.05, three times that is not


@pytest.mark.parametrize(
    ("examples", "more_right", "answer"),
    [
        (2000, 5, "equal within 2 points"),  # 0.25 points more, 0.1 to 0.5; McNemar's p is 2 / 2^5
        (2000, 0, "equal within 2 points"),
        (2000, 30, "holds"),  # a difference is a difference, however small
        (151, 0, "equal within 2 points"),
        (150, 0, "cannot be told"),  # 3 / 150 is 2 points
        (300, 4, "cannot be told"),  # 1.3 points more, 0.3 to 2.7
    ],
)
def test_orderings_table_tells_equal_rows_from_undecided_ones(
    spec: ExperimentSpec, table_records: RecordList, examples: int, more_right: int, answer: str
) -> None:
    found = answers(spec, table_records, {0: 60 + more_right, 3: 60, 6: 100}, examples)
    assert found["LLaVA", "1 token / 4 tokens"] == answer


def test_orderings_table_caption_counts_answers(spec: ExperimentSpec, table_records: RecordList) -> None:
    table = tables(spec, table_records)["table60_mixed_orderings"]
    counts = table.data["answer"].value_counts()
    for answer in ("holds", "does not hold", "equal within 2 points", "cannot be told"):
        assert f"{answer}: {counts.get(answer, 0)}" in table.caption
    assert f"Of the {len(table.data)} pairs" in table.caption
    assert any("one row on this model: 1 token / 4 tokens" in note for note in table.notes)


def test_experiment_tables_without_paper_values_have_no_orderings(table_records: RecordList) -> None:
    table = next(spec for spec in load_specs() if spec.name == "zero_tokens")
    for record in table_records[3:6]:
        record["config"]["prefusion"]["layers"], record["experiment"] = 1, "zero_tokens"
    assert set(tables(table, table_records[3:6])) == {"zero_tokens"}


def test_experiment_table_tokens_are_mean_over_layers(spec: ExperimentSpec, table_records: RecordList) -> None:
    for record in table_records[:3]:
        record["model"]["visual_tokens_mean"] = 12.3456
    assert tables(spec, table_records)["table60_mixed"].text["Tokens"][0] == "12.3"


def test_experiment_table_has_latency_column_if_measured(spec: ExperimentSpec, table_records: RecordList) -> None:
    assert not any("atency" in column for column in tables(spec, table_records)["table60_mixed"].text)
    for record in table_records[:3]:
        record["cost"] |= {"latency": 1.2345, "latency_note": "median of 9"}
    table = tables(spec, table_records)["table60_mixed"]
    assert list(table.text["Latency (ms)"]) == ["1,234.5", *["not timed"] * 2, "not run", "not timed", "failed"]
    assert table.data["latency_seconds"][0] == 1.2345
    assert "Latency: median of 9." in table.notes


def test_experiment_table_zero_tokens_are_shown(spec: ExperimentSpec, table_records: RecordList) -> None:
    for record in table_records[:3]:
        record["model"]["visual_tokens"] = 0
    assert tables(spec, table_records)["table60_mixed"].text["Tokens"][0] == "0"


def test_experiment_table_notes_excluded_families_and_code_versions(
    spec: ExperimentSpec, table_records: RecordList
) -> None:
    longer = copy.deepcopy(table_records[0])
    longer["config"]["train"]["max_steps"], longer["id"] = 400, "f" * 16
    table_records[1]["provenance"]["code"] = "another"
    notes = " ".join(tables(spec, [*table_records, longer])["table60_mixed"].notes)
    assert "1 other family of records of this experiment left out, set apart by train.max_steps=400." in notes
    assert "The records come from 2 versions of the code." in notes
    assert "left out" not in " ".join(tables(spec, table_records)["table60_mixed"].notes)


@pytest.mark.parametrize(
    ("key", "shown"),
    [
        ("compressor.name", "Compressor"),
        ("prefusion.layers", "Pre-fusion layers"),
        ("compressor.before_projection", "Compressor before projection"),
        ("tiles", "Tiles"),
    ],
)
def test_column_heading_is_readable(key: str, shown: str) -> None:
    assert experiment_rows.column_heading(key) == shown


def test_experiment_table_columns_are_the_varied_settings(table_records: RecordList) -> None:
    by_name = {spec.name: spec for spec in load_specs()}

    def columns(name: str, **changes: Any) -> list[str]:
        record = copy.deepcopy(table_records[3])
        record["experiment"] = name
        for key, value in changes.items():
            group, _, field = key.partition("__")
            record["config"][group][field] = value
        text = tables(by_name[name], [record])[name].text
        return list(text.columns[1 : list(text.columns).index("Tokens")])

    assert columns("table6_prefusion") == ["Compressor", "Pre-fusion layers"]
    assert columns("zero_tokens", prefusion__layers=1) == ["Pre-fusion layers"]
    switches = {"before_projection": True, "attention": "multi_head", "positions": "query_grid"}
    changes = {f"compressor__{name}": value for name, value in switches.items()}
    assert columns("code_against_paper", **changes, prefusion__visual_tokens=True) == [
        "Compressor before projection",
        "Compressor attention",
        "Compressor positions",
        "Pre-fusion visual tokens",
    ]
