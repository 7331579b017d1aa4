"""Measured costs as the paper's Figs. 7, 8 and 9 draw them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.benchmarks.model_cost.records import PARTS, Measured, Setting
from experiments.cost.paper_values import FIRST_TOKEN, GEOMETRY, MEMORY, TOTALS
from experiments.report.figures.style import (
    BLACK,
    BLUE,
    CONTROL,
    GREEN,
    GREY,
    LINESTYLES,
    MARKERS,
    ORANGE,
    ORDERED,
    WIDTH,
    legend,
    styled,
)
from experiments.report.formatting import unit

_COLOURS = (GREY, "#bbbbbb", GREEN, ORANGE, BLUE, "#003a70", "#e6c100")
_PRINTED: dict[str, Any] = {"color": BLACK, "marker": "D", "linestyle": "none", "markerfacecolor": "white", "zorder": 5}
SIZES = ((2**30, "GiB"), (2**20, "MiB"))


@styled
def bars(found: Mapping[Setting, Sequence[Measured]]) -> Figure:
    """Figs. 7 and 8: FLOPs and time to the first token by component, a row of two panels for each setting, over the
    fewest frames that it has. Diamonds: what the paper prints, where the geometry is its own."""
    figure = Figure(figsize=(WIDTH, 2.6 * len(found) + 0.3), layout="constrained")
    panels = figure.subplots(len(found), 2, squeeze=False)
    for (setting, rows), (work, time) in zip(found.items(), panels, strict=True):
        frames = min(row.frames for row in rows)
        fewest = [row for row in rows if row.frames == frames]
        scale, prefix = unit(max(row.flops for row in fewest))
        _stack(work, fewest, [{part: row.row["flops"][part] / scale for part in PARTS} for row in fewest])
        _stack(time, fewest, [_milliseconds(row) for row in fewest])
        work.set_ylabel(f"{prefix}FLOPs to the first token")
        time.set_ylabel("time to the first token (ms)")
        work.set_title(f"{setting}{f', {frames:,} frames' if frames > 1 else ''}", loc="left")
        if setting.geometry == GEOMETRY and frames == 1:
            _mark(work, fewest, {size: 1e12 / scale * value for size, value in TOTALS.get(setting.tiles, {}).items()})
            _mark(time, fewest, FIRST_TOKEN["A100 40G"] if setting.tiles == 1 else {})
    legend(figure, list(panels.flat), columns=4)
    return figure


def _milliseconds(row: Measured) -> dict[str, float]:
    """By component, with what passes between them."""
    if row.seconds is None:
        return dict.fromkeys(PARTS, 0.0)
    parts = {part: 1000 * row.seconds[part] for part in PARTS}
    return parts | {"rest": max(0.0, 1000 * row.seconds["first token"] - sum(parts.values()))}


def _stack(axes: Axes, rows: Sequence[Measured], heights: Sequence[Mapping[str, float]]) -> None:
    below = [0.0] * len(rows)
    for (part, name), colour in zip((PARTS | {"rest": "in between"}).items(), _COLOURS, strict=True):
        if any(h.get(part) for h in heights):
            values = [h.get(part, 0.0) for h in heights]
            axes.bar(range(len(rows)), values, 0.7, bottom=below, color=colour, label=name)
            below = [low + value for low, value in zip(below, values, strict=True)]
    for place, height in enumerate(below):
        shown = (f"{height:,.0f}" if height >= 100 else f"{height:.3g}") if height else "no room"
        axes.annotate(shown, (place, height), (0, 2), textcoords="offset points", ha="center", fontsize=7)
    axes.set_xticks(range(len(rows)), [row.name for row in rows])
    axes.grid(visible=False, axis="x")
    axes.margins(y=0.12)


def _mark(axes: Axes, rows: Sequence[Measured], printed: Mapping[int, float]) -> None:
    places = [place for place, row in enumerate(rows) if row.size in printed]
    if places:
        axes.plot(places, [printed[rows[place].size] for place in places], **_PRINTED, label="printed (A100)")


@styled
def memory(found: Mapping[Setting, Sequence[Measured]]) -> Figure:
    """Fig. 9: peak memory against frames, a panel for each setting. Diamonds: what the paper prints of LLaVA-Mini, where
    the geometry is its own."""
    columns = min(2, len(found))
    rows_of_panels = -(-len(found) // columns)
    figure = Figure(figsize=(WIDTH, 3.0 * rows_of_panels), layout="constrained")
    panels = list(figure.subplots(rows_of_panels, columns, squeeze=False).flat)
    for spare in panels[len(found) :]:
        spare.remove()
    for axes, (setting, rows) in zip(panels, found.items(), strict=False):
        most = max(row.peak or 0 for row in rows)
        scale, name_of_scale = next((pair for pair in SIZES if most >= pair[0]), SIZES[-1])
        for number, size in enumerate(dict.fromkeys(row.size for row in rows)):
            of_size = [row for row in rows if row.size == size]
            if len(of_size) < 2:  # how memory grows was not asked
                continue
            line = [(row.frames, row.peak / scale) for row in of_size if row.peak]
            looks = {"color": ORDERED[(number - 1) % len(ORDERED)]} if size else CONTROL
            looks = {
                "marker": MARKERS[number % len(MARKERS)],
                "linestyle": LINESTYLES[number % len(LINESTYLES)],
            } | looks
            axes.plot([frames for frames, _ in line], [peak for _, peak in line], label=of_size[0].name, **looks)
        if setting.geometry == GEOMETRY and setting.tiles == 1:
            printed = [value * 2**30 / scale for value in MEMORY.values()]
            axes.plot(list(MEMORY), printed, **_PRINTED, label="printed, 1 token")
        frames = sorted({row.frames for row in rows})
        axes.set(xscale="log", xlabel="frames", ylabel=f"peak memory ({name_of_scale})")
        axes.set_xticks(frames, [f"{count:,}" for count in frames])
        axes.set_xticks([], minor=True)
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        axes.set_title(str(setting), loc="left")
    legend(figure, panels[: len(found)], columns=4)
    return figure
