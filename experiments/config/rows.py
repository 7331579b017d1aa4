"""The rows of an ablation table, as conf/experiment/ lists them: which settings each has, and what the paper prints.

An experiment's `rows` are the table. Each row has a `label`, maybe `paper` (what the paper prints in this row, by task), and
dotted keys of the configuration with their values; all rows name the same keys. The first row is the baseline. `row=2`
runs the third, and `-m` all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import OmegaConf

PAPER_GRID = 24  # patches a side of the paper's CLIP tower at 336 pixels


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Args:
        settings: Dotted keys of the configuration and their values.
        paper: What the paper prints in this row: a number by task, `tflops` among them.
    """

    label: str
    settings: dict[str, Any]
    paper: dict[str, float] = field(default_factory=dict)


def read(name: str, rows: Any) -> list[Row]:
    """The rows of experiment `name` from plain containers.

    Raises:
        ValueError: if they are no table.
    """
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) and "label" in row for row in rows):
        raise ValueError(f"experiment {name}: rows must be a list of mappings, each with a label")
    found = [
        Row(
            str(row["label"]),
            {key: row[key] for key in row if key not in ("label", "paper")},
            dict(row.get("paper", {})),
        )
        for row in rows
    ]
    for row in found:
        if different := sorted(row.settings.keys() ^ found[0].settings.keys()):
            raise ValueError(
                f"experiment {name}: all rows name the same settings, but '{row.label}' differs in {different[0]}"
            )
    return found


def scaled(grid: int | None, size: int, resolution: int = 1) -> int:
    """`${scaled:...}` in a config: the C for a tower of `grid` x `grid` patches that stands for the paper's C of 24 x 24.

    grid^(ln C / ln 24), rounded: one token stays one, all stay all, and what lies between keeps its place on a
    logarithmic scale. `resolution` is the number of tiles a side, which multiplies both grids.

    Raises:
        ValueError: if the grid is not known.
    """
    if grid is None:
        raise ValueError(
            "model.grid: say how many patches a side the vision tower has, since this experiment scales by it"
        )
    here, paper = grid * resolution, PAPER_GRID * resolution
    return round(here ** (math.log(size) / math.log(paper)))


def register() -> None:
    """Make `${scaled:...}` known to OmegaConf."""
    OmegaConf.register_new_resolver("scaled", scaled, replace=True)
