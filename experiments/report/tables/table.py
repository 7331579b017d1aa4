"""A table of a report, and helpers that every table uses."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from experiments.report.formatting import NONE
from experiments.report.run_groups import RunGroup
from experiments.report.statistics import Interval

LATENCY_COLUMN = "Latency (ms)"
NO_ROWS = "No record belongs in this table."


@dataclass(frozen=True)
class Table:
    """A table in two forms: plain numbers for CSV and formatted text for readers. Jupyter shows it with its caption.

    Args:
        name: Stem of the table's files.
        caption: Sentence above the table.
        data: Plain numbers; accuracies and differences are fractions.
        text: Formatted cells, one string each.
        numeric: Columns of `text` that are aligned right.
        notes: Paragraphs below the table.
        bold: Cells of `text` in bold, as (row number, column).
    """

    name: str
    caption: str
    data: pd.DataFrame
    text: pd.DataFrame
    numeric: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    bold: frozenset[tuple[int, str]] = frozenset()

    @property
    def incomplete_rows(self) -> frozenset[int]:
        """Numbers of the rows that failed or were not run."""
        return frozenset(
            i for i, row in enumerate(self.text.itertuples(index=False)) if {"failed", "not run"} & set(row)
        )

    def _repr_html_(self) -> str:
        """Return the table as HTML with caption and notes, for Jupyter."""
        header = "".join(self._html_cell("th", column, column) for column in self.text.columns)
        rows = [
            "".join(
                self._html_cell("td", column, cell, bold=(number, column) in self.bold)
                for column, cell in zip(self.text.columns, row, strict=True)
            )
            for number, row in enumerate(self.text.itertuples(index=False, name=None))
        ]
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        notes = "".join(f"<p><small>{html.escape(note)}</small></p>" for note in self.notes)
        caption = f"<p><b>{html.escape(self.caption)}</b></p>"
        return f"{caption}<table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table>{notes}"

    def _html_cell(self, tag: str, column: str, text: str, bold: bool = False) -> str:
        align = "right" if column in self.numeric else "left"
        content = f"<b>{html.escape(text)}</b>" if bold else html.escape(text)
        return f'<{tag} style="text-align: {align}">{content}</{tag}>'


def with_columns(
    table: Table, data: Sequence[Mapping[str, Any]], text: Sequence[Mapping[str, str]], note: str
) -> Table:
    """Return a table with more columns of numbers, and a note on them.

    Args:
        table: The table.
        data: The plain numbers of each row.
        text: The formatted cells of each row.
        note: The note.
    """
    columns = pd.DataFrame(text)
    return replace(
        table,
        data=pd.concat([table.data, pd.DataFrame(data)], axis=1),
        text=pd.concat([table.text, columns], axis=1),
        numeric=(*table.numeric, *columns),
        notes=(*table.notes, note),
    )


def shorten_reason(reason: str) -> str:
    """Shorten a reason to fit a table cell; the table's notes hold the full text."""
    return reason if len(reason) <= 36 else f"{reason[:33].rstrip()}..."


def format_optional(value: float | None) -> str:
    """Format a number without trailing zeros, None as a dash."""
    return NONE if value is None else f"{value:g}"


def group_name(group: RunGroup) -> str:
    """Return a run group's model, compressor, tokens, pre-fusion layers and differing settings as one line."""
    if group.is_baseline:
        name = f"{group.label}, {token_count(group)} tokens"
    else:
        tokens = "token" if group.visual_tokens == 1 else "tokens"
        name = f"{group.label}, {group.compressor}, {token_count(group)} {tokens}, {group.prefusion_layers} pre-fusion"
    return f"{name}, {group.settings}" if group.settings else name


def token_count(group: RunGroup) -> str:
    """Return the visual tokens of a run group as a text: a mean over layers where some are dropped on the way."""
    return "unknown" if group.visual_tokens is None else f"{group.visual_tokens:.4g}"


def data_frame(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    """Return rows of plain numbers as a DataFrame.

    Args:
        rows: The rows.
        columns: The columns that a table without rows has, so that its CSV keeps a header.
    """
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=list(columns))


def interval_columns(name: str, interval: Interval | None) -> dict[str, float | None]:
    """Return three columns of a table's data: the mean under `name`, and its bounds."""
    values = (None, None, None) if interval is None else interval
    return dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))
