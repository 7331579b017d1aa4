"""Tables against golden files. To renew one, delete it and run this test twice: the first run writes it and fails."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from experiments.records.files import Records
from experiments.report.formatting import quantity
from experiments.report.run_groups import ablation_cells, group_cells
from experiments.report.tables import ablation, blind_controls, fusion_depth, provenance, question_types, writers
from experiments.report.tables import table as table_module
from experiments.report.verdict import judge, probed

GOLDEN = Path(__file__).parent / "golden"
WRITERS = {"md": writers.markdown, "tex": writers.latex, "csv": writers.csv}
NAMES = ("ablation", "accuracy_by_kind", "fusion_depth", "provenance", "removal_by_kind", "sight")


@pytest.fixture
def made(records: list[dict[str, Any]]) -> dict[str, table_module.Table]:
    finished = tuple(record for record in records if record["status"] == "finished")
    loaded = Records(finished, tuple(record for record in records if record["status"] == "failed"), (), ())
    cells, found = ablation_cells(group_cells(loaded)), probed(loaded)
    all_tables = (
        ablation.ablation_table(cells),
        question_types.kinds_table(cells, found),
        question_types.removal_kinds_table(found),
        blind_controls.sight_table(found),
        fusion_depth.fusion_table([judge(record) for record in found], []),
        provenance.provenance_table(loaded),
    )
    return {table.name: table for table in all_tables}


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("name", NAMES)
def test_golden(made: dict[str, table_module.Table], name: str, suffix: str) -> None:
    path, text = GOLDEN / f"{name}.{suffix}", WRITERS[suffix](made[name])
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        pytest.fail(f"{path.name} was missing and has been written: read it, then run again")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_no_cell_is_blank(made: dict[str, table_module.Table], name: str) -> None:
    cells = made[name].text.to_numpy().ravel()
    assert all(isinstance(cell, str) and cell.strip() and cell != "nan" for cell in cells)


@pytest.mark.parametrize("name", NAMES)
def test_csv_reads_back(made: dict[str, table_module.Table], name: str) -> None:
    back = pd.read_csv(io.StringIO(writers.csv(made[name])))
    assert back.shape == made[name].data.shape


def test_accuracy_by_kind_is_a_weighted_mean(made: dict[str, table_module.Table]) -> None:
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
def test_latex_escaping(text: str, escaped: str) -> None:
    assert writers.escape(text) == escaped


def hostile() -> table_module.Table:
    frame = pd.DataFrame({"a_b": ["[1] & 2", "x | y"], "n%": ["1", "2"]})
    return table_module.Table("a_b", "100% of #1", frame, frame, ("n%",), ("50% {of}",))


def test_latex_has_as_many_columns_in_every_row() -> None:
    lines = writers.latex(hostile()).splitlines()
    rows = [line for line in lines if line.endswith(r"\\")]
    assert [row.replace(r"\&", "").count("&") for row in rows] == [1, 1, 1]
    assert rows[1].startswith("{}[1]")
    assert r"\label{tab:a-b}" in lines
    assert r"\begin{tabular}{lr}" in lines
    assert [line for line in lines if line.endswith("rule")] == [r"\toprule", r"\midrule", r"\bottomrule"]


def test_markdown_bars_stay_in_their_cell() -> None:
    row = next(line for line in writers.markdown(hostile()).splitlines() if "x" in line)
    assert row == r"| x \| y | 2 |"


@pytest.mark.parametrize(
    ("value", "text"), [(1.79e6, "1.79 M"), (999, "999"), (1000, "1.00 k"), (8.55e12, "8.55 T"), (0.0, "0.00")]
)
def test_quantities(value: float, text: str) -> None:
    assert quantity(value) == text


def test_quantity_not_counted() -> None:
    assert quantity(float("nan")) == "not counted"
