"""The last lines in the terminal: what was found and where the page is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from experiments.report.records import describe
from experiments.report.tables import Table
from experiments.report.verdict import Headline, Verdict, curves_of, depth_text

_LEFT_OUT = ("n", "Seeds", "Parameters")


def show(console: Console, headline: Headline, verdicts: Sequence[Verdict], ablation: Table, page: Path) -> None:
    """Print the fusion depths, the ablation table and the path of the page."""
    console.print(Text(headline.title, style="bold"))
    if not verdicts:
        console.print(Text(headline.sentence))
    for verdict in verdicts:
        console.print(Text(f"{describe(verdict.record)}: {verdict.answer}"))
        for kind in curves_of(verdict.record):
            console.print(Text(f"  fusion depth from {kind}: {depth_text(verdict.record, kind)}"))
    if not ablation.text.empty:
        console.print(_terminal_table(ablation))
    console.print(Text(f"Page: {page}"), soft_wrap=True)


def _terminal_table(table: Table) -> RichTable:
    columns = [column for column in table.text.columns if column not in _LEFT_OUT]
    shown = RichTable(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        shown.add_column(column, justify="right" if column in table.numeric else "left")
    for row in table.text[columns].itertuples(index=False):
        # Text: a bracketed interval is no rich markup.
        shown.add_row(*(Text(cell) for cell in row))
    return shown
