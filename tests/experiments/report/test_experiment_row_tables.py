"""The tables of a study against golden files (see test_formats.py), and what must hold of any."""

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
from experiments.report.experiment_results import Study, study_of
from experiments.report.experiment_specs import FOLDER, Definition, definitions
from experiments.report.run_groups import group_cells
from experiments.report.tables import experiment_rows, writers
from experiments.report.tables.table import Table
from tests.experiments.report.test_writers import GOLDEN, WRITERS

Made = list[dict[str, Any]]
NAMES = ("table60_mixed", "table60_mixed_orderings")


def study(definition: Definition, records: Made) -> Study:
    parts = (tuple(r for r in records if r["status"] == status) for status in ("finished", "failed"))
    found = study_of(definition, group_cells(Records(*parts, (), ())))
    assert found is not None
    return found


def tables(definition: Definition, records: Made) -> dict[str, Table]:
    return {table.name: table for table in tables_module.study_tables([study(definition, records)])}


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("name", NAMES)
def test_golden(definition: Definition, table_records: Made, name: str, suffix: str) -> None:
    path, text = GOLDEN / f"{name}.{suffix}", WRITERS[suffix](tables(definition, table_records)[name])
    if not path.exists():
        path.write_text(text, encoding="utf-8")
        pytest.fail(f"{path.name} was missing and has been written: read it, then run again")
    assert text == path.read_text(encoding="utf-8")


def test_the_order_of_records_changes_nothing(definition: Definition, table_records: Made) -> None:
    made = tables(definition, table_records)
    random.Random(0).shuffle(table_records)
    again = tables(definition, sorted(table_records, key=lambda record: record["id"]))
    for name, table in made.items():
        assert all(write(table) == write(again[name]) for write in WRITERS.values())


@pytest.mark.parametrize("name", NAMES)
def test_no_cell_is_blank(definition: Definition, table_records: Made, name: str) -> None:
    table = tables(definition, table_records)[name]
    cells = table.text.to_numpy().ravel()
    assert all(isinstance(cell, str) and cell.strip() and cell != "nan" for cell in cells)
    back = pd.read_csv(io.StringIO(writers.csv(table)))
    assert back.shape == table.data.shape


def test_holes_say_what_they_are(definition: Definition, table_records: Made) -> None:
    table = tables(definition, table_records)["table60_mixed"]
    text = table.text.set_index("Row")
    assert set(text.loc["64 tokens"]) >= {"not run", "0 of 3"}
    assert set(text.loc["2 layers, 50% | average"]) >= {"failed", "0 of 3"}
    assert text.loc["2 layers", "Seeds"] == "1 of 3"
    assert table.holes == {3, 5}
    assert "2 layers, seed 1: failed: RuntimeError: out of memory at step 12_000." in table.notes
    assert "2 layers, seed 2: not run." in table.notes
    failed = "failed: RuntimeError: out of memory at step 12_000."
    assert f"2 layers, 50% | average, seeds 0, 1, 2: {failed}" in table.notes
    assert "64 tokens: not run." in table.notes


def test_the_caption_states_the_arithmetic_of_sizes(definition: Definition, table_records: Made) -> None:
    caption = tables(definition, table_records)["table60_mixed"].caption
    assert (
        "24 x 24 grid is brought to this model's 6 x 6 by 6^(ln C / ln 24), rounded: 2 to 1, 4 to 2, 8 to 3." in caption
    )
    assert "Rows that are the same settings on this model are one: 1 token / 4 tokens." in caption
    assert "shapes, test split, n = 120 questions, 3 seeds, model tiny, cpu (2 threads)" in caption
    for record in table_records:
        record["config"]["model"]["grid"] = 24
        record["config"]["compressor"]["size"] *= 2  # what was a size of 2 is now the paper's 4
    assert "brought to" not in tables(definition, table_records)["table60_mixed"].caption


def test_tiles_widen_both_grids(table_records: Made) -> None:
    table7 = next(found for found in definitions() if found.name == "table7_tokens")
    said = table7.scaled_sizes({"model.grid": 6})
    assert said.endswith(
        "rounded: 2 to 1, 4 to 2, 8 to 3; with 2 tiles a side both grids are 2 times as wide: 4 to 2, 8 to 4, 12 to 5, "
        "24 to 8."
    )


def test_the_best_is_bold_in_every_format(definition: Definition, table_records: Made) -> None:
    table = tables(definition, table_records)["table60_mixed"]
    assert table.bold == {(0, "Accuracy (%)")}
    shown = table.text["Accuracy (%)"][0]
    assert f"| **{shown}** |" in writers.markdown(table)
    assert rf"& \textbf{{{shown}}} &" in writers.latex(table)
    assert list(table.data["best"]) == [True] + [False] * 5
    again = [copy.deepcopy(record) for record in table_records]
    for other, record in zip(again[3:6], table_records[:3], strict=True):
        other["accuracy"] = record["accuracy"]
    table = tables(definition, again)["table60_mixed"]
    assert not table.bold
    assert "**" not in writers.markdown(table).partition("\n")[2]
    note = next(note for note in table.notes if note.startswith("Bold"))
    assert re.search(
        r"No row is: the highest, LLaVA, is \+0\.0 \[.*\] from the next, 1 token / 4 tokens \(p = 1\.000\)\.$", note
    )


def test_the_paper_stands_beside_ours_on_its_own_task_alone(definition: Definition, table_records: Made) -> None:
    assert not any("aper" in column for column in tables(definition, table_records)["table60_mixed"].text)
    for record in table_records:
        record["config"]["data"]["name"] = "GQA"
    table = tables(definition, table_records)["table60_mixed"]
    # 1 and 4 tokens are one row here and two in the paper, whose last row has none
    assert list(table.text["Paper, GQA"]) == ["62.0", "\u2013", "55.4", "56.7", "57.6", "\u2013"]
    assert table.data["paper_gqa"][0] == 62.0


def paper_orders(rows: list[dict[str, Any]]) -> set[tuple[str, str]]:
    """Pairs of labels, the higher first, by a loop over the YAML."""
    found = set()
    for first in rows:
        for second in rows:
            above = [first["paper"].get(task, 0) > second["paper"].get(task, 1e9) for task in ("vqav2", "gqa", "mmb")]
            if all(above):
                found.add((first["label"], second["label"]))
    return found


@pytest.mark.parametrize("name", ["table6_prefusion", "table8_compression"])
def test_the_pairs_are_those_the_paper_orders(table_records: Made, name: str) -> None:
    rows = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())["rows"]
    table = next(found for found in definitions() if found.name == name)
    for record in table_records:
        record["experiment"] = name
        if name == "table8_compression":
            record["config"]["compressor"], record["config"]["prefusion"]["layers"] = {"name": "query", "size": 1}, 4
    found = tables(table, table_records[:6] if name == "table6_prefusion" else table_records[:3])
    data = found[f"{name}_orderings"].data
    assert set(zip(data["higher"], data["lower"], strict=True)) == paper_orders(rows)


def answers(definition: Definition, table_records: Made, rates: dict[int, int]) -> dict[tuple[str, str], str]:
    """The orderings where the first, fourth and sixth cell (rows 0, 1 and 2) are right this often of 120."""
    made = []
    for index, count in rates.items():
        record = copy.deepcopy(table_records[index])
        record["accuracy"] = {"image": "1" * count + "0" * (120 - count)}
        made.append(record)
    data = tables(definition, made)["table60_mixed_orderings"].data
    return {(row.higher, row.lower): row.answer for row in data.itertuples()}


def test_orderings_hold_do_not_or_cannot_be_told(definition: Definition, table_records: Made) -> None:
    few = "1 token / 4 tokens"
    found = answers(definition, table_records, {0: 60, 3: 30, 6: 90})
    assert found["LLaVA", few] == "holds"
    assert found["LLaVA", "16 tokens"] == "does not hold"
    assert found["16 tokens", few] == "holds"
    assert found["LLaVA", "64 tokens"] == "cannot be told"  # not run
    found = answers(definition, table_records, {0: 60, 3: 57, 6: 90})
    assert found["LLaVA", few] == "cannot be told"  # three questions, McNemar's p is 0.25
    assert found["16 tokens", few] == "holds"


def test_orderings_are_corrected_for_their_number(definition: Definition, table_records: Made) -> None:
    few = "1 token / 4 tokens"
    # Three pairs are compared. McNemar's p is 2 / 2^k for k questions of which all go one way.
    found = answers(definition, table_records, {0: 60, 3: 52, 6: 60})
    assert found["LLaVA", few] == "holds"  # 3 x 2 / 256
    found = answers(definition, table_records, {0: 60, 3: 54, 6: 60})
    assert found["LLaVA", few] == "cannot be told"  # 2 / 64 alone is below 0.05, three times that is not


def test_the_orderings_are_counted(definition: Definition, table_records: Made) -> None:
    table = tables(definition, table_records)["table60_mixed_orderings"]
    counts = table.data["answer"].value_counts()
    for answer in ("holds", "does not hold", "cannot be told"):
        assert f"{answer}: {counts.get(answer, 0)}" in table.caption
    assert f"Of the {len(table.data)} pairs" in table.caption
    assert any("one row on this model: 1 token / 4 tokens" in note for note in table.notes)


def test_no_orderings_without_printed_values(table_records: Made) -> None:
    table = next(found for found in definitions() if found.name == "zero_tokens")
    for record in table_records[3:6]:
        record["config"]["prefusion"]["layers"], record["experiment"] = 1, "zero_tokens"
    assert set(tables(table, table_records[3:6])) == {"zero_tokens"}


def test_tokens_of_a_row_are_the_mean_over_layers(definition: Definition, table_records: Made) -> None:
    for record in table_records[:3]:
        record["model"]["visual_tokens_mean"] = 12.3456
    assert tables(definition, table_records)["table60_mixed"].text["Tokens"][0] == "12.3"


def test_latency_has_a_column_where_it_was_measured(definition: Definition, table_records: Made) -> None:
    assert not any("atency" in column for column in tables(definition, table_records)["table60_mixed"].text)
    for record in table_records[:3]:
        record["cost"] |= {"latency": 1.2345, "latency_note": "median of 9"}
    table = tables(definition, table_records)["table60_mixed"]
    assert list(table.text["Latency (ms)"]) == ["1,234.5", *["not timed"] * 2, "not run", "not timed", "failed"]
    assert table.data["latency_seconds"][0] == 1.2345
    assert "Latency: median of 9." in table.notes


def test_zero_tokens_are_a_number(definition: Definition, table_records: Made) -> None:
    for record in table_records[:3]:
        record["model"]["visual_tokens"] = 0
    assert tables(definition, table_records)["table60_mixed"].text["Tokens"][0] == "0"


def test_left_out_and_other_versions_are_noted(definition: Definition, table_records: Made) -> None:
    longer = copy.deepcopy(table_records[0])
    longer["config"]["train"]["steps"], longer["id"] = 400, "f" * 16
    table_records[1]["provenance"]["code"] = "another"
    notes = " ".join(tables(definition, [*table_records, longer])["table60_mixed"].notes)
    assert "1 other family of records of this experiment left out, set apart by train.steps=400." in notes
    assert "The records come from 2 versions of the code." in notes
    assert "left out" not in " ".join(tables(definition, table_records)["table60_mixed"].notes)


@pytest.mark.parametrize(
    ("key", "shown"),
    [
        ("compressor.name", "Compressor"),
        ("prefusion.layers", "Pre-fusion layers"),
        ("compressor.before_projection", "Compressor before projection"),
        ("tiles", "Tiles"),
    ],
)
def test_headings(key: str, shown: str) -> None:
    assert experiment_rows.heading(key) == shown


def test_columns_are_what_the_rows_vary(table_records: Made) -> None:
    by_name = {found.name: found for found in definitions()}

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
