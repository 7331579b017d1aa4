"""Columns of the table of accuracy by question type, for types that are named like other columns."""

from __future__ import annotations

from typing import Any

import pytest

from experiments.records.files import Records
from experiments.report.run_groups import group_runs
from experiments.report.tables.question_types import question_type_table
from tests.experiments.sample_records import table_record


@pytest.mark.parametrize(
    ("types", "headings"),
    [
        (("all", "model"), ["All (type)", "Model (type)"]),
        (("input", "seeds"), ["Input (type)", "Seeds (type)"]),
        (("Color", "color"), ["Color", "color"]),
        (("COLOR", "Color", "color"), ["Color", "Color (type)", "color"]),
        (("x", "x_low"), ["X", "X_low"]),
        (("Model", "model"), ["Model (type)", "Model (type 2)"]),
        (("place", "count"), ["Count", "Place"]),
    ],
)
def test_question_types_have_columns_of_their_own(types: tuple[str, ...], headings: list[str]) -> None:
    record: dict[str, Any] = table_record("query", 1, 0, 0)
    right = record["accuracy"]["image"]
    kinds = [types[index % len(types)] for index in range(len(right))]
    record["data"]["kinds"] = kinds
    table = question_type_table(group_runs(Records((record,), (), (), ())), ())
    assert list(table.text.columns) == ["Model", "Input", "Seeds", "All", *headings]
    assert table.data.columns.is_unique
    (data,), (text,) = table.data.to_dict("records"), table.text.to_dict("records")
    assert (data["input"], data["seeds"], text["Seeds"]) == ("image", 1, "1")
    assert data["model"] == text["Model"] != ""
    assert data["all"] == right.count("1") / len(right)
    expected = {name: [r for r, kind in zip(right, kinds, strict=True) if kind == name] for name in types}
    counts = [value for key, value in data.items() if key.endswith("_n") and key != "all_n"]
    assert counts == [len(expected[name]) for name in sorted(types)]
    for name, heading in zip(sorted(types), headings, strict=True):
        share = 100 * expected[name].count("1") / len(expected[name])
        assert text[heading].startswith(f"{share:.1f}")
        assert heading in table.numeric


def test_two_runs_of_a_model_that_differ_in_a_setting_without_effect_have_one_row() -> None:
    first, second = table_record("none", 1, 0, 0), table_record("none", 1, 0, 0)
    second["id"], second["config"]["compressor"]["size"] = "f" * 16, 4
    table = question_type_table(group_runs(Records((first, second), (), (), ())), ())
    assert len(table.text) == 1
