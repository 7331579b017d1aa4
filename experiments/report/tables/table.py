"""TODO"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from experiments.report.formatting import NONE
from experiments.report.run_groups import Cell
from experiments.report.statistics import Interval


@dataclass(frozen=True)
class Table:
    """A table twice over: `data` holds plain numbers (accuracies and differences from 0 to 1), `text` what is shown.

    `numeric` are the columns of `text` that are set flush right; `notes` go below; `bold` are cells of `text`, each as
    row and column.
    """

    name: str
    caption: str
    data: pd.DataFrame
    text: pd.DataFrame
    numeric: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    bold: frozenset[tuple[int, str]] = frozenset()

    @property
    def holes(self) -> frozenset[int]:
        """Rows of what failed or was not run."""
        return frozenset(
            i for i, row in enumerate(self.text.itertuples(index=False)) if {"failed", "not run"} & set(row)
        )


LATENCY = "Latency (ms)"


def shorten(reason: str) -> str:
    """A reason short enough for a cell of a table; the notes below hold the whole of it."""
    return reason if len(reason) <= 36 else f"{reason[:33].rstrip()}..."


def _shown(value: float | None) -> str:
    return NONE if value is None else f"{value:g}"


def cell_name(cell: Cell) -> str:
    if cell.is_baseline:
        name = f"{cell.label}, {cell.visual_tokens} tokens"
    else:
        tokens = "token" if cell.visual_tokens == 1 else "tokens"
        name = f"{cell.label}, {cell.compressor}, {cell.visual_tokens} {tokens}, {cell.prefusion_layers} pre-fusion"
    return f"{name}, {cell.settings}" if cell.settings else name


def bounds(name: str, interval: Interval | None) -> dict[str, float | None]:
    """Three columns of a table's data: the mean under `name`, and its bounds."""
    values = (None, None, None) if interval is None else interval
    return dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))
