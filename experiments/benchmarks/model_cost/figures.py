"""Figures of measured costs, in the form of the paper's Figs. 7, 8 and 9."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.benchmarks.model_cost.records import COMPONENTS, CostSetting, MeasuredModel
from experiments.cost.paper_values import (
    PAPER_ARCHITECTURE,
    PRINTED_FIRST_TOKEN_MS,
    PRINTED_PEAK_GB,
    PRINTED_TOTAL_TFLOPS,
)
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

MEMORY_UNITS = ((2**30, "GiB"), (2**20, "MiB"))

_COMPONENT_COLOURS = (GREY, "#bbbbbb", GREEN, ORANGE, BLUE, "#003a70", "#e6c100")
_PRINTED_STYLE: dict[str, Any] = {
    "color": BLACK,
    "marker": "D",
    "linestyle": "none",
    "markerfacecolor": "white",
    "zorder": 5,
}


@styled
def component_bars(measured: Mapping[CostSetting, Sequence[MeasuredModel]]) -> Figure:
    """Draw FLOPs and time to the first token by component (Figs. 7 and 8).

    Diamonds mark the values that the paper prints, if the setting has the paper's architecture.

    Args:
        measured: Measured models by setting. Each setting gets a row of two panels, over its smallest number of frames.
    """
    figure = Figure(figsize=(WIDTH, 2.6 * len(measured) + 0.3), layout="constrained")
    panels = figure.subplots(len(measured), 2, squeeze=False)
    for (setting, rows), (flops_axes, time_axes) in zip(measured.items(), panels, strict=True):
        frames = min(row.frames for row in rows)
        shown_rows = [row for row in rows if row.frames == frames]
        scale, prefix = unit(max(row.flops for row in shown_rows))
        _stack(
            flops_axes,
            shown_rows,
            [{part: row.row["flops"][part] / scale for part in COMPONENTS} for row in shown_rows],
        )
        _stack(time_axes, shown_rows, [_milliseconds(row) for row in shown_rows])
        flops_axes.set_ylabel(f"{prefix}FLOPs to the first token")
        time_axes.set_ylabel("time to the first token (ms)")
        flops_axes.set_title(f"{setting}{f', {frames:,} frames' if frames > 1 else ''}", loc="left")
        if setting.geometry == PAPER_ARCHITECTURE and frames == 1:
            _mark_printed(
                flops_axes,
                shown_rows,
                {size: 1e12 / scale * value for size, value in PRINTED_TOTAL_TFLOPS.get(setting.tiles, {}).items()},
            )
            _mark_printed(time_axes, shown_rows, PRINTED_FIRST_TOKEN_MS["A100 40G"] if setting.tiles == 1 else {})
    legend(figure, list(panels.flat), columns=4)
    return figure


@styled
def memory_curves(measured: Mapping[CostSetting, Sequence[MeasuredModel]]) -> Figure:
    """Draw peak memory against the number of frames (Fig. 9).

    Diamonds mark the values that the paper prints for LLaVA-Mini, if the setting has the paper's architecture.

    Args:
        measured: Measured models by setting. Each setting gets a panel.
    """
    columns = min(2, len(measured))
    rows_of_panels = -(-len(measured) // columns)
    figure = Figure(figsize=(WIDTH, 3.0 * rows_of_panels), layout="constrained")
    panels = list(figure.subplots(rows_of_panels, columns, squeeze=False).flat)
    for spare in panels[len(measured) :]:
        spare.remove()
    for axes, (setting, rows) in zip(panels, measured.items(), strict=False):
        largest = max(row.peak or 0 for row in rows)
        scale, unit_name = next((pair for pair in MEMORY_UNITS if largest >= pair[0]), MEMORY_UNITS[-1])
        for index, size in enumerate(dict.fromkeys(row.size for row in rows)):
            size_rows = [row for row in rows if row.size == size]
            if len(size_rows) < 2:  # one point shows no growth
                continue
            line = [(row.frames, row.peak / scale) for row in size_rows if row.peak]
            line_style = {"color": ORDERED[(index - 1) % len(ORDERED)]} if size else CONTROL
            line_style = {
                "marker": MARKERS[index % len(MARKERS)],
                "linestyle": LINESTYLES[index % len(LINESTYLES)],
            } | line_style
            axes.plot([frames for frames, _ in line], [peak for _, peak in line], label=size_rows[0].name, **line_style)
        if setting.geometry == PAPER_ARCHITECTURE and setting.tiles == 1:
            printed = [value * 2**30 / scale for value in PRINTED_PEAK_GB.values()]
            axes.plot(list(PRINTED_PEAK_GB), printed, **_PRINTED_STYLE, label="printed, 1 token")
        frames = sorted({row.frames for row in rows})
        axes.set(xscale="log", xlabel="frames", ylabel=f"peak memory ({unit_name})")
        axes.set_xticks(frames, [f"{count:,}" for count in frames])
        axes.set_xticks([], minor=True)
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        axes.set_title(str(setting), loc="left")
    legend(figure, panels[: len(measured)], columns=4)
    return figure


def _milliseconds(row: MeasuredModel) -> dict[str, float]:
    """Return the time of each component, and the rest that passes between them."""
    if row.seconds is None:
        return dict.fromkeys(COMPONENTS, 0.0)
    parts = {part: 1000 * row.seconds[part] for part in COMPONENTS}
    return parts | {"rest": max(0.0, 1000 * row.seconds["first token"] - sum(parts.values()))}


def _stack(axes: Axes, rows: Sequence[MeasuredModel], heights: Sequence[Mapping[str, float]]) -> None:
    """Draw a stacked bar for each model, with its total above it."""
    below = [0.0] * len(rows)
    for (part, name), colour in zip((COMPONENTS | {"rest": "in between"}).items(), _COMPONENT_COLOURS, strict=True):
        if any(bar.get(part) for bar in heights):
            values = [bar.get(part, 0.0) for bar in heights]
            axes.bar(range(len(rows)), values, 0.7, bottom=below, color=colour, label=name)
            below = [low + value for low, value in zip(below, values, strict=True)]
    for index, height in enumerate(below):
        label = (f"{height:,.0f}" if height >= 100 else f"{height:.3g}") if height else "not run"
        axes.annotate(label, (index, height), (0, 2), textcoords="offset points", ha="center", fontsize=7)
    axes.set_xticks(range(len(rows)), [row.name for row in rows])
    axes.grid(visible=False, axis="x")
    axes.margins(y=0.12)


def _mark_printed(axes: Axes, rows: Sequence[MeasuredModel], printed: Mapping[int, float]) -> None:
    indices = [index for index, row in enumerate(rows) if row.size in printed]
    if indices:
        axes.plot(indices, [printed[rows[index].size] for index in indices], **_PRINTED_STYLE, label="printed (A100)")
