"""The last lines in the terminal: what was found and where the page is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from experiments.records.views import describe
from experiments.report.experiment_results import Study
from experiments.report.tables.table import Table
from experiments.report.verdict import Headline, Verdict, curves_of, depth_text

_LEFT_OUT = ("n", "Seeds", "Parameters")


def show(
    console: Console,
    headline: Headline,
    verdicts: Sequence[Verdict],
    studies: Sequence[Study],
    tables: Sequence[Table],
    page: Path,
) -> None:
    """Print the fusion depths, the table of each study, the ablation table and the path of the page."""
    if verdicts or not studies:
        console.print(Text(headline.title, style="bold"))
    if not verdicts and not studies:
        console.print(Text(headline.sentence))
    for verdict in verdicts:
        console.print(Text(f"{describe(verdict.record)}: {verdict.answer}"))
        for kind in curves_of(verdict.record):
            console.print(Text(f"  fusion depth from {kind}: {depth_text(verdict.record, kind)}"))
    by_name = {table.name: table for table in tables}
    for study in studies:
        console.print(Text(by_name[study.name].caption))
        console.print(_terminal_table(by_name[study.name]))
        if orderings := by_name.get(f"{study.name}_orderings"):
            console.print(Text(orderings.caption.removeprefix(study.definition.title).strip()))
        console.print()
    if not by_name["ablation"].text.empty:
        console.print(_terminal_table(by_name["ablation"]))
    console.print(Text(f"Page: {page}"), soft_wrap=True)


def _terminal_table(table: Table) -> RichTable:
    columns = [column for column in table.text.columns if column not in _LEFT_OUT]
    shown = RichTable(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        shown.add_column(column, justify="right" if column in table.numeric else "left")
    for number, row in enumerate(table.text[columns].itertuples(index=False)):
        # Text: a bracketed interval is no rich markup.
        cells = zip(columns, row, strict=True)
        shown.add_row(*(Text(cell, style="bold" if (number, column) in table.bold else "") for column, cell in cells))
    return shown
