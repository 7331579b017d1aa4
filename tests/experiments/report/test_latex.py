"""Tests of LaTeX tables: they compile, at 7 pt or more, inside the page, also without rows and with very wide ones."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from experiments.report.tables import writers
from experiments.report.tables.latex import latex
from experiments.report.tables.latex_layout import FOOTNOTE, SCRIPT, lay_out, text_width, words
from experiments.report.tables.table import Table

RESULTS = Path(__file__).resolve().parents[3] / "results"
PREAMBLE = r"\documentclass{article}\usepackage{booktabs,graphicx}\begin{document}"
needs_latex = pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")


def make_table(text: pd.DataFrame, caption: str = "A caption.", notes: tuple[str, ...] = ()) -> Table:
    return Table("mine", caption, text, text, tuple(text.columns[1:]), notes)


def wide_tables() -> dict[str, Table]:
    """Return tables that are hard to set: without columns, without rows, wide, long, with long words, with symbols."""
    interval, path = "\u221283.1 [\u221281.0, +85.2]", "/home/someone/very_long_folder/checkpoint.of.a.model/config=1"
    return {
        "no columns": make_table(pd.DataFrame()),
        "no rows": make_table(pd.DataFrame(columns=["Model", "n"])),
        "one column": make_table(pd.DataFrame({"Model": ["[1]", "b"]})),
        "many columns": make_table(pd.DataFrame({f"Question type {i}": [interval] * 3 for i in range(25)})),
        "many rows": make_table(pd.DataFrame({"Model": [f"model {i}" for i in range(300)], "n": ["1"] * 300})),
        "long cells": make_table(pd.DataFrame({f"Setting {i}": [path * 3, "a b " * 60] for i in range(4)})),
        "one long word": make_table(pd.DataFrame({"Model": ["x" * 400]})),
        "long notes": make_table(pd.DataFrame({"a": ["1"]}), notes=("A sentence of a note. " * 30,) * 12),
        "long word in a note": make_table(pd.DataFrame({"a": ["1"]}), notes=(f"failed: {path * 4}",)),
        "symbols": make_table(
            pd.DataFrame({"a\u2265b": ["50% & x_y #1 $2 ~ ^ {} \\ | \u2264 \u2248 \u2260 \u00d7 \u2013"]})
        ),
        "wide and long": make_table(pd.DataFrame({f"Column number {i}": [interval] * 90 for i in range(14)})),
    }


def compile_table(text: str, folder: Path) -> str:
    """Compile a table and return LaTeX's log."""
    (folder / "t.tex").write_text(PREAMBLE + "\n" + text + r"\end{document}", encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
    assert done.returncode == 0, next(line for line in done.stdout.splitlines() if line.startswith("!"))
    return done.stdout


@needs_latex
@pytest.mark.parametrize("name", wide_tables())
def test_latex_of_a_difficult_table_compiles_inside_the_page(name: str, tmp_path: Path) -> None:
    log = compile_table(latex(wide_tables()[name]), tmp_path)
    assert "Overfull" not in log
    assert "too large" not in log


@needs_latex
def test_shipped_tables_compile_inside_the_page(tmp_path: Path) -> None:
    paths = sorted(RESULTS.rglob("report/**/*.tex"))
    assert len(paths) > 25
    tables = [re.sub(r"\\label\{.*?\}", "", path.read_text(encoding="utf-8")) for path in paths]
    log = compile_table("\\clearpage\n".join(tables), tmp_path)
    assert "Overfull" not in log
    assert "too large" not in log


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("report/**/*.tex")), ids=lambda path: path.stem)
def test_shipped_tables_have_readable_type_and_one_number(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert set(re.findall(r"\\([a-z]+size|small|tiny)\b", text.replace(r"\_", ""))) <= {
        "footnotesize",
        "scriptsize",
        "normalsize",
    }
    assert r"\resizebox" not in text
    assert r"\scalebox" not in text
    assert not re.search(r"\\caption\{(Table|Figure) ", text)


@pytest.mark.parametrize(
    ("caption", "set_caption"),
    [
        ("Table 6: the effect of layers.", "The effect of layers."),
        ("table S2. Mine", "Mine"),
        ("Fig. 7 \u2013 cost", "Cost"),
        ("TABLE 10: Table 3 of another paper", "Rows of Table 3 of another paper"),
        ("Tables of mine", "Tables of mine"),
        ("Table 6 of the paper", "Rows of Table 6 of the paper"),
    ],
)
def test_latex_caption_leaves_the_number_to_latex(caption: str, set_caption: str) -> None:
    assert rf"\caption{{{set_caption}}}" in latex(make_table(pd.DataFrame({"a": ["1"]}), caption))


def test_table_without_columns_says_so() -> None:
    assert r"\begin{tabular}{l}" in latex(make_table(pd.DataFrame()))
    for write in (latex, writers.markdown):
        assert "No record belongs in this table." in write(make_table(pd.DataFrame()))


@pytest.mark.parametrize("name", wide_tables())
def test_latex_holds_every_row_once_in_every_panel(name: str) -> None:
    table = wide_tables()[name]
    header, rows = list(table.text.columns), table.text.to_numpy().tolist()
    if not header:
        return
    layout = lay_out(header, rows, table.caption, table.notes)
    assert [row for page in layout.pages for row in page.rows] == list(range(len(rows)))
    assert [note for page in layout.pages for note in page.notes] == list(range(len(table.notes)))
    first, *others = layout.panels
    columns = [*first.columns, *(column for panel in others for column in panel.columns[1:])]
    assert columns == list(range(len(header)))
    assert all(panel.columns[0] == 0 for panel in layout.panels)


@needs_latex
@pytest.mark.parametrize("size", [FOOTNOTE, SCRIPT], ids=lambda size: size.command)
@pytest.mark.parametrize("text", ["83.1 [81.0, 85.2]", "LLaVA-Mini, average, 4 tokens", "0123456789abcdef", "Wwm%"])
def test_text_width_is_at_least_that_of_latex(size, text: str, tmp_path: Path) -> None:
    escaped = text.replace("%", r"\%")
    log = compile_table(rf"\newsavebox\x\sbox\x{{\{size.command} {escaped}}}\typeout{{WIDTH \the\wd\x}}x", tmp_path)
    match = re.search(r"WIDTH ([\d.]+)pt", log)
    assert match
    assert float(match[1]) <= text_width(text, size) <= 1.15 * float(match[1])


def test_words_keep_an_interval_whole() -> None:
    assert words("83.1 [81.0, 85.2], 3 of 4") == ["83.1", "[81.0, 85.2],", "3", "of", "4"]
