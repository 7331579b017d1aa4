"""Writers of a table: Markdown, LaTeX (booktabs) and CSV text."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from experiments.report.tables.latex import escape, latex
from experiments.report.tables.table import Table

__all__ = ["csv", "escape", "latex", "markdown", "markdown_table"]


def markdown(table: Table) -> str:
    """Return a table as GitHub-flavoured Markdown: caption, table, notes."""
    rows = _format_cells(table)
    lines = markdown_table(list(table.text.columns), rows, table.numeric)
    return "\n".join([f"**{table.caption}**", "", lines, *(f"\n{note}" for note in table.notes)]) + "\n"


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], right_aligned: Collection[str]) -> str:
    """Return a Markdown table, without a newline at its end.

    Args:
        columns: Column headers.
        rows: A text for each column, row by row; special characters are not escaped.
        right_aligned: The headers of the columns that are aligned to the right.
    """
    rule = ["---:" if column in right_aligned else "---" for column in columns]
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, rule, *rows))


def csv(table: Table) -> str:
    """Return a table's plain numbers as CSV: fractions with six significant digits, empty if undefined."""
    return table.data.to_csv(index=False, float_format="%.6g", lineterminator="\n")


def _format_cells(table: Table) -> list[list[str]]:
    columns = list(table.text.columns)
    rows = enumerate(table.text.itertuples(index=False, name=None))
    return [
        [
            f"**{_markdown_cell(cell)}**" if (i, column) in table.bold else _markdown_cell(cell)
            for column, cell in zip(columns, row, strict=True)
        ]
        for i, row in rows
    ]


def _markdown_cell(cell: str) -> str:
    return cell.replace("\\", "\\\\").replace("|", "\\|")
