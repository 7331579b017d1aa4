"""Onset table: the first layer that needs the image beside the last, of every probed model and question type."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from experiments.records.views import Record, record_label, record_seed
from experiments.report.formatting import NONE
from experiments.report.tables.table import Table, data_frame

_DATA_COLUMNS = (
    *("model", "seed", "kind", "examples", "onset", "low", "high"),
    *("depth", "depth_low", "depth_high", "layers"),
)
_TEXT_COLUMNS = ("Model", "Question type", "n", "Onset", "95% CI", "Depth by removal", "95% CI of the depth")


def onset_table(probed: Sequence[Record]) -> Table:
    """Build the table of fusion onsets.

    Args:
        probed: Finished records with a probe; those without an onset are skipped.
    """
    data, text = [], []
    for record in probed:
        for kind, onset, depth in _rows(record):
            examples = sum(kind in ("", name) for name in record["data"]["kinds"])
            data.append(
                {
                    "model": record["name"],
                    "seed": record_seed(record),
                    "kind": kind,
                    "examples": examples,
                    **{key: onset[key] for key in ("onset", "low", "high")},
                    "depth": depth.get("depth"),
                    "depth_low": depth.get("low"),
                    "depth_high": depth.get("high"),
                    "layers": onset["layers"],
                }
            )
            cells = (
                record_label(record),
                kind or "all",
                str(examples),
                *_cells(onset, "onset", onset["layers"]),
                *_cells(depth, "depth", onset["layers"]),
            )
            text.append(dict(zip(_TEXT_COLUMNS, cells, strict=True)))
    notes = (
        "Onset: the first layer that needs the image, counted from 1; the image may arrive after the layers before it. It "
        "is the smallest k for which hiding the visual tokens in the first k layers, or in more, costs at least 10% of "
        "what they are worth. Depth by removal: the number of first layers that must attend to them. Onset and depth "
        "bound the layers that read the image. None: no cost of hiding the image beyond chance is shown. Intervals: 95% "
        "bootstrap over examples.",
    )
    caption = "Fusion onset beside fusion depth, by question type."
    numeric = ("n", "Onset", "Depth by removal")
    return Table(
        "onset", caption, data_frame(data, _DATA_COLUMNS), pd.DataFrame(text, columns=_TEXT_COLUMNS), numeric, notes
    )


def _rows(record: Record) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """Yield question type ("" for all), onset and depth by removal ({} if it was not measured)."""
    onset = record.get("onset") or {}
    if onset.get("estimate") is not None:
        yield "", onset["estimate"], (record.get("fusion") or {}).get("removal") or {}
    depths = (record.get("removal") or {}).get("by_kind") or {}
    for kind, estimate in sorted((onset.get("by_kind") or {}).items()):
        yield kind, estimate, depths.get(kind) or {}


def _cells(estimate: Mapping[str, Any], key: str, layers: int) -> tuple[str, str]:
    """Return the texts of an estimate and of its interval."""
    if not estimate:
        return "not measured", NONE
    if estimate[key] is None:
        return "none", NONE
    return f"{estimate[key]} of {layers}", f"{estimate['low']:g} to {estimate['high']:g}"
