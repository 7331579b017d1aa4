"""The rows of an ablation table, as the files in conf/experiment/ list them.

Each row has a `label`, maybe `paper` (the values that the paper prints in this row, by benchmark), and settings with their
values, dotted (`compressor.size: 2`) or nested (`compressor: {size: 2}`); all rows name the same settings. The first row is
the baseline. `row=2` runs the third row, and `-m` all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import OmegaConf

from experiments.config.plain import flatten_config

PAPER_GRID = 24
"""Patches per side of the paper's CLIP vision tower at 336 pixels."""


@dataclass(frozen=True)
class TableRow:
    """One row of a table.

    Attributes:
        label: Its name in the table.
        settings: Dotted settings and their values.
        paper: What the paper prints in this row, by benchmark, and `tflops`.
    """

    label: str
    settings: dict[str, Any]
    paper: dict[str, float] = field(default_factory=dict)


def read_rows(experiment: str, rows: Any) -> list[TableRow]:
    """Return the rows of a table.

    Args:
        experiment: Its name, for error messages.
        rows: The `rows` of its file, as plain containers.

    Raises:
        ValueError: If these are not rows of one table.
    """
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) and "label" in row for row in rows):
        raise ValueError(f"experiment {experiment}: rows must be a list of mappings, each with a label")
    table = [
        TableRow(
            str(row["label"]),
            _dotted_settings(experiment, row),
            _paper_values(experiment, row),
        )
        for row in rows
    ]
    for row in table:
        if different := sorted(row.settings.keys() ^ table[0].settings.keys()):
            raise ValueError(
                f"experiment {experiment}: row '{row.label}' differs from the first in {different[0]}; all rows must "
                "name the same settings"
            )
    return table


def _paper_values(experiment: str, row: Mapping[Any, Any]) -> dict[str, float]:
    """Return what the paper prints in a row: nothing where `paper` is missing or null."""
    values = row.get("paper")
    if values is None:
        return {}
    if not isinstance(values, Mapping) or not all(isinstance(value, (int, float)) for value in values.values()):
        raise ValueError(
            f"experiment {experiment}: row '{row['label']}' has paper: {values}; it must map benchmarks to numbers, as "
            "{gqa: 62.0}"
        )
    return dict(values)


def _dotted_settings(experiment: str, row: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the settings of a row by dotted keys: no setting has a mapping as its value."""
    dotted: dict[str, Any] = {}
    for key, value in flatten_config({key: row[key] for key in row if key not in ("label", "paper")}):
        if key in dotted:
            raise ValueError(f"experiment {experiment}: row '{row['label']}' sets {key} twice: {dotted[key]}, {value}")
        dotted[key] = value
    return dotted


def scaled_size(grid: int | None, size: int, resolution: int = 1) -> int:
    """Return the size C for a model's grid that stands for a size of the paper: the resolver `${scaled:...}`.

    The result is grid^(ln C / ln 24), rounded. One token stays one, all tokens stay all, and a size in between keeps its
    place on a logarithmic scale.

    Args:
        grid: Patches per side of the model's vision tower.
        size: C in the paper, whose grid is 24 x 24.
        resolution: Tiles per side, which multiply both grids.

    Raises:
        ValueError: If the grid is not known.
    """
    if grid is None:
        raise ValueError("model.grid: missing; this table scales sizes by the patches per side of the vision tower")
    return round((grid * resolution) ** (math.log(size) / math.log(PAPER_GRID * resolution)))


def size_of_tokens(grid: int | None, tokens: int) -> int:
    """Return the least size C with at least the share `tokens` of 576 of a model's patches: `${size_of_tokens:...}`.

    Three sizes of a table stay different on a small grid, where the scale of `scaled_size` would merge them.

    Args:
        grid: Patches per side of the model's vision tower.
        tokens: Visual tokens of an image in the paper, of its 576 patches.

    Raises:
        ValueError: If the grid is not known.

    Example:
        >>> [size_of_tokens(24, tokens) for tokens in (192, 128, 64)]
        [14, 12, 8]
        >>> [size_of_tokens(6, tokens) for tokens in (192, 128, 64)]
        [4, 3, 2]
    """
    if grid is None:
        raise ValueError("model.grid: missing; this table scales sizes by the patches per side of the vision tower")
    return math.isqrt(math.ceil(tokens * grid**2 / PAPER_GRID**2) - 1) + 1


def token_share(grid: int | None, size: int) -> float:
    """Return the share of a model's patches that C x C tokens are: `${token_share:...}`.

    Args:
        grid: Patches per side of the model's vision tower.
        size: C.

    Raises:
        ValueError: If the grid is not known.
    """
    if grid is None:
        raise ValueError("model.grid: missing; this table takes shares of the patches per side of the vision tower")
    return size**2 / grid**2


def register_resolvers() -> None:
    """Register `${scaled:...}`, `${size_of_tokens:...}` and `${token_share:...}` with OmegaConf."""
    for name, resolver in (("scaled", scaled_size), ("size_of_tokens", size_of_tokens), ("token_share", token_share)):
        OmegaConf.register_new_resolver(name, resolver, replace=True)
