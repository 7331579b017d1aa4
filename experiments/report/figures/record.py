"""Figures of a single record, drawn into the results folder when its run ends."""

from __future__ import annotations

from pathlib import Path

from experiments.records.files import read_record
from experiments.report.figures import (
    attention_figure,
    contribution_figure,
    entropy_figure,
    fusion_figure,
    lens_figure,
    removal_figure,
    save,
    sinks_figure,
    swaps_figure,
)


def draw_record(path: Path) -> list[Path]:
    """Draw every probe of a record into `figures/<identity>-*.png` (and PDF) of its results folder.

    Args:
        path: The record file, RESULTS/records/<identity>.json.

    Returns:
        Paths of the PNG files.
    """
    record = read_record(path)
    folder = path.parent.parent / "figures"
    folder.mkdir(exist_ok=True)
    drawn = []
    for part, name, figure in (
        ("attention", "attention", attention_figure),
        ("attention", "entropy", entropy_figure),
        ("contribution", "contribution", contribution_figure),
        ("sinks", "sinks", sinks_figure),
        ("removal", "removal", removal_figure),
        ("knockout", "fusion", fusion_figure),
        ("lens", "lens", lens_figure),
        ("swaps", "swaps", swaps_figure),
    ):
        if record.get(part):
            png, _ = save(figure(record), folder / f"{path.stem}-{name}")
            drawn.append(png)
    return drawn
