"""Writers of a table: Markdown, LaTeX (booktabs) and CSV text."""

from __future__ import annotations

from experiments.markdown import markdown_cell, markdown_table
from experiments.report.tables.latex import escape, latex
from experiments.report.tables.table import NO_ROWS, Table

__all__ = ["csv", "escape", "latex", "markdown"]


def markdown(table: Table) -> str:
    """Return a table as GitHub-flavoured Markdown: caption, table, notes. Without columns, a sentence says so."""
    columns = list(table.text.columns)
    lines = markdown_table(columns, _format_cells(table), table.numeric) if columns else NO_ROWS
    return "\n".join([f"**{table.caption}**", "", lines, *(f"\n{note}" for note in table.notes)]) + "\n"


def csv(table: Table) -> str:
    """Return a table's plain numbers as CSV: fractions with six significant digits, empty if undefined."""
    return table.data.to_csv(index=False, float_format="%.6g", lineterminator="\n")


def _format_cells(table: Table) -> list[list[str]]:
    columns = list(table.text.columns)
    rows = enumerate(table.text.itertuples(index=False, name=None))
    return [
        [
            f"**{markdown_cell(cell)}**" if (i, column) in table.bold else markdown_cell(cell)
            for column, cell in zip(columns, row, strict=True)
        ]
        for i, row in rows
    ]
