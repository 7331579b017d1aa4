"""Tests of tables and their writers against golden files.

To regenerate a golden file, delete it and run its test twice: the first run writes the file and fails.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from experiments.records.files import Records
from experiments.report.claims.registry import judge_by_question_type, judge_claims
from experiments.report.formatting import format_quantity
from experiments.report.fusion_depths import probed_records
from experiments.report.run_groups import compare_with_baselines, group_runs
from experiments.report.tables import (
    ablation,
    blind_controls,
    claims,
    fusion_depth,
    onset,
    provenance,
    question_types,
    writers,
)
from experiments.report.tables import table as table_module

GOLDEN = Path(__file__).parent / "golden"
WRITERS = {"md": writers.markdown, "tex": writers.latex, "csv": writers.csv}
NAMES = (
    "ablation",
    "accuracy_by_kind",
    "claims",
    "claims_by_question_type",
    "fusion_depth",
    "onset",
    "provenance",
    "removal_by_kind",
    "sight",
)


@pytest.fixture
def made(records: list[dict[str, Any]]) -> dict[str, table_module.Table]:
    finished = tuple(record for record in records if record["status"] == "finished")
    loaded = Records(finished, tuple(record for record in records if record["status"] == "failed"), (), ())
    groups, with_probe = compare_with_baselines(group_runs(loaded)), probed_records(loaded)
    findings = judge_claims(group_runs(loaded))
    all_tables = (
        claims.claims_table(findings),
        claims.claims_by_question_type_table(judge_by_question_type(findings)),
        ablation.ablation_table(groups),
        question_types.question_type_table(groups, with_probe),
        question_types.removal_by_question_type_table(with_probe),
        blind_controls.blind_controls_table(with_probe),
        fusion_depth.fusion_depth_table(with_probe, []),
        onset.onset_table(with_probe),
        provenance.provenance_table(loaded),
    )
    return {table.name: table for table in all_tables}


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("name", NAMES)
def test_tables_match_golden_files(made: dict[str, table_module.Table], name: str, suffix: str) -> None:
    path, text = GOLDEN / f"{name}.{suffix}", WRITERS[suffix](made[name])
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        pytest.fail(f"{path.name} was missing and has been written; review it and run the test again")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_tables_have_no_blank_cell(made: dict[str, table_module.Table], name: str) -> None:
    cells = made[name].text.to_numpy().ravel()
    assert all(isinstance(cell, str) and cell.strip() and cell != "nan" for cell in cells)


@pytest.mark.parametrize("name", NAMES)
def test_csv_reads_back_with_same_shape(made: dict[str, table_module.Table], name: str) -> None:
    back = pd.read_csv(io.StringIO(writers.csv(made[name])))
    assert back.shape == made[name].data.shape


def test_question_type_table_total_is_weighted_mean(made: dict[str, table_module.Table]) -> None:
    data = made["accuracy_by_kind"].data
    kinds = ("place", "count", "colour & shape")
    weighted = sum(data[kind] * data[f"{kind}_n"] for kind in kinds) / data["all_n"]
    pd.testing.assert_series_equal(weighted, data["all"], check_names=False)


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("50% & more_less", r"50\% \& more\_less"),
        (r"C:\new {x} #1 $2 ~a ^b", r"C:\textbackslash{}new \{x\} \#1 \$2 \textasciitilde{}a \textasciicircum{}b"),
        ("p < 0.001 | a > b", r"p \textless{} 0.001 \textbar{} a \textgreater{} b"),
        ("\u22125.0 \u2192 2\u00d72", r"$-$5.0 $\to$ 2$\times$2"),
    ],
)
def test_escape_special_characters(text: str, escaped: str) -> None:
    assert writers.escape(text) == escaped


def table_with_special_characters() -> table_module.Table:
    frame = pd.DataFrame({"a_b": ["[1] & 2", "x | y"], "n%": ["1", "2"]})
    return table_module.Table("a_b", "100% of #1", frame, frame, ("n%",), ("50% {of}",))


def test_latex_every_row_has_all_columns() -> None:
    lines = writers.latex(table_with_special_characters()).splitlines()
    rows = [line for line in lines if line.endswith(r"\\")]
    assert [row.replace(r"\&", "").count("&") for row in rows] == [1, 1, 1]
    assert rows[1].startswith("{}[1]")
    assert r"\label{tab:a-b}" in lines
    assert r"\begin{tabular}{lr}" in lines
    assert [line for line in lines if line.endswith("rule")] == [r"\toprule", r"\midrule", r"\bottomrule"]


def test_markdown_escapes_bars() -> None:
    row = next(line for line in writers.markdown(table_with_special_characters()).splitlines() if "x" in line)
    assert row == r"| x \| y | 2 |"


@pytest.mark.parametrize(
    ("value", "text"), [(1.79e6, "1.79 M"), (999, "999"), (1000, "1.00 k"), (8.55e12, "8.55 T"), (0.0, "0.00")]
)
def test_format_quantity_has_three_digits_and_prefix(value: float, text: str) -> None:
    assert format_quantity(value) == text


def test_format_quantity_nan_is_not_counted() -> None:
    assert format_quantity(float("nan")) == "not counted"
