"""The terminal summary of a report: the claims, one table of accuracies and the path of the page."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from experiments.report.results import Report
from experiments.report.tables.claims import summarize
from experiments.report.tables.table import Table

MOST_LINES = 25
_MOST_CLAIMS = 12
_OMITTED_COLUMNS = ("n", "Seeds", "Parameters", "Paper", "Line", "Smallest effect")
_MEASURED_ON = "Measured on"
_EXPERIMENT_COLUMNS = ("Row", "FLOPs", "Accuracy (%)", "Difference", "p")


def print_summary(console: Console, report: Report, page: Path) -> None:
    """Print the claims, the ablation table and the path of the page, in at most `MOST_LINES` lines.

    Without ablation cells, the first experiment's table takes their place, or else that of the benchmarks. Rows that do
    not fit are counted, and tables that do not fit are named.

    Args:
        console: Where to print.
        report: The report.
        page: Path of its HTML page.
    """
    claims, ablation = report.tables["claims"], report.tables["ablation"]
    compared = ablation if not ablation.text.empty else next((report.tables[name] for name in report.experiments), None)
    if compared is None:
        compared = report.tables.get("benchmarks")
    others = [name for name in (*report.experiments, "benchmarks") if name in report.tables]
    others = [name for name in others if compared is None or name != compared.name]
    console.print(Text(summarize(report.findings), style="bold"), no_wrap=True, overflow="ellipsis")
    # The sentence, the two headings, the names of other tables and the page.
    lines = MOST_LINES - 5
    if not claims.text.empty:
        lines -= _print_rows(console, claims, _MOST_CLAIMS if compared is not None else lines)
    if compared is not None and not compared.text.empty:
        _print_rows(console, compared, lines)
    if others:
        console.print(Text(f"Also on the page: {', '.join(others)}"), no_wrap=True, overflow="ellipsis")
    console.print(Text(f"Page: {page}"), soft_wrap=True)


def _print_rows(console: Console, table: Table, most: int) -> int:
    """Print the first rows of a table, one line each, and return how many lines its rows took."""
    columns = [column for column in table.text.columns if column not in _OMITTED_COLUMNS]
    if _MEASURED_ON in columns and not table.text[columns[0]].duplicated().any():
        columns.remove(_MEASURED_ON)  # without it, every row is told apart
    # The label of a row names its settings.
    columns = [column for column in columns if "Row" not in columns or column in _EXPERIMENT_COLUMNS]
    rendered = RichTable(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        rendered.add_column(
            column, justify="right" if column in table.numeric else "left", no_wrap=True, overflow="ellipsis"
        )
    rows = list(table.text[columns].itertuples(index=False))
    shown = rows if len(rows) <= most else rows[: most - 1]
    for number, row in enumerate(shown):
        # Text objects, because rich would read a bracketed interval as markup.
        cells = zip(columns, row, strict=True)
        rendered.add_row(
            *(Text(cell, style="bold" if (number, column) in table.bold else "") for column, cell in cells)
        )
    console.print(rendered)
    if len(shown) < len(rows):
        console.print(Text(f"... and {len(rows) - len(shown)} more rows in {table.name}.md"))
    return min(len(rows), most)
