"""The figures of one record, drawn beside it as soon as it is there."""

from __future__ import annotations

from pathlib import Path

from experiments.records.files import read
from experiments.report.figures import (
    attention_figure,
    entropy_figure,
    fusion_figure,
    lens_figure,
    removal_figure,
    save,
)


def draw_record(path: Path) -> list[Path]:
    """Draw what a record holds into `figures/<identity>-*.png` (and PDF) of its results folder."""
    record = read(path)
    folder = path.parent.parent / "figures"
    folder.mkdir(exist_ok=True)
    drawn = []
    for part, name, figure in (
        ("attention", "attention", attention_figure),
        ("attention", "entropy", entropy_figure),
        ("removal", "removal", removal_figure),
        ("knockout", "fusion", fusion_figure),
        ("lens", "lens", lens_figure),
    ):
        if record.get(part):
            png, _ = save(figure(record), folder / f"{path.stem}-{name}")
            drawn.append(png)
    return drawn
