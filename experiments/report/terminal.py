"""The terminal summary of a report: fusion depths, tables and the path of the page."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from experiments.records.views import record_label
from experiments.report.results import Report
from experiments.report.tables.table import Table
from experiments.report.verdict import depth_text, reported_curves

_OMITTED_COLUMNS = ("n", "Seeds", "Parameters")


def print_summary(console: Console, report: Report, page: Path) -> None:
    """Print the fusion depths, the table of each experiment, the ablation table and the path of the page.

    Args:
        console: Where to print.
        report: The report.
        page: Path of its HTML page.
    """
    if report.verdicts or not report.experiments:
        console.print(Text(report.headline.title, style="bold"))
    if not report.verdicts and not report.experiments:
        console.print(Text(report.headline.sentence))
    for verdict in report.verdicts:
        console.print(Text(f"{record_label(verdict.record)}: {verdict.answer}"))
        for curve in reported_curves(verdict.record):
            console.print(Text(f"  fusion depth from {curve}: {depth_text(verdict.record, curve)}"))
    for name, results in report.experiments.items():
        console.print(Text(report.tables[name].caption))
        console.print(_terminal_table(report.tables[name]))
        if orderings := report.tables.get(f"{name}_orderings"):
            console.print(Text(orderings.caption.removeprefix(results.spec.title).strip()))
        console.print()
    if not report.tables["ablation"].text.empty:
        console.print(_terminal_table(report.tables["ablation"]))
    console.print(Text(f"Page: {page}"), soft_wrap=True)


def _terminal_table(table: Table) -> RichTable:
    columns = [column for column in table.text.columns if column not in _OMITTED_COLUMNS]
    rendered = RichTable(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        rendered.add_column(column, justify="right" if column in table.numeric else "left")
    for number, row in enumerate(table.text[columns].itertuples(index=False)):
        # Text objects, because rich would read a bracketed interval as markup.
        cells = zip(columns, row, strict=True)
        rendered.add_row(
            *(Text(cell, style="bold" if (number, column) in table.bold else "") for column, cell in cells)
        )
    return rendered
