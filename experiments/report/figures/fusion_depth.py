"""Fusion figure: the attention, removal, knock-out and read-out curves side by side, each with its fusion depth."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.records.views import Record, layers_with_vision, parse_outcomes, percent_right, window_middles
from experiments.report.figures.style import (
    BLACK,
    CONTROL,
    GREY,
    MEASURED,
    SECOND,
    legend,
    make_panels,
    mark_depth,
    styled,
)
from experiments.report.statistics import mean_interval

TITLES = {
    "attention": "Attention, instruction → vision",
    "removal": "Removal: vision hidden from a layer onward",
    "knockout": "Knock-out: text cut off from vision",
    "readout": "Read-out of the answer from the question",
}


@styled
def fusion_figure(record: Record) -> Figure:
    """Draw one panel for each fusion curve of a record.

    Bands are 95% bootstrap intervals over examples. The green line and shade are the curve's fusion depth with its
    interval. With windows of several layers they stand at the middle of the last window that counts.

    Args:
        record: A finished record of an attention experiment.

    Raises:
        ValueError: if the record holds none of the curves.
    """
    present = [curve for curve in TITLES if record.get(curve) is not None]
    if not present:
        raise ValueError(f"record {record['id']} holds no curve that locates fusion")
    figure, axes = make_panels(len(present), columns=2, height=2.3, label="Percent")
    for axis, curve in zip(axes, present, strict=True):
        _DRAW_CURVE[curve](axis, record)
        axis.set_title(TITLES[curve], loc="left")
        axis.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True))
        axis.set_xlim(-0.3, record["model"]["layers"] + 0.3)
        depth = (record.get("fusion") or {}).get(curve)
        if curve == "knockout" and depth and depth["depth"] is not None:
            depth = _at_window_middle(axis, depth, record["knockout"]["width"])
        _draw_depth(axis, depth)
    axes[0].set_ylim(0, 103)
    legend(figure, axes, columns=3)
    return figure


def _draw_attention(axis: Axes, record: Record) -> None:
    attention = record["attention"]
    pair = attention["pairs"].index(["instruction", "vision"])
    mass = 100 * np.asarray(attention["mass"][pair], dtype=float)
    _draw_band(axis, np.arange(1, len(mass) + 1), mass, MEASURED)
    axis.set_xlabel("Layer")


def _draw_removal(axis: Axes, record: Record) -> None:
    _draw_band(axis, np.asarray(layers_with_vision(record)), percent_right(record["removal"]["onward"]), SECOND)
    axis.set_xlabel("First layers with vision")


def _draw_knockout(axis: Axes, record: Record) -> None:
    intact, *windows = record["knockout"]["windows"]
    middle = np.array(window_middles(windows))
    _draw_band(axis, middle, percent_right(windows), {**SECOND, "marker": "v"})
    axis.axhline(float(percent_right([intact]).mean()), color=BLACK, linestyle="-", linewidth=1.1, label="intact")
    width = record["knockout"]["width"]
    axis.set_xlabel("Layer" if width == 1 else f"Middle of {width} layers")


def _at_window_middle(axis: Axes, depth: dict[str, Any], width: int) -> dict[str, Any]:
    """Return a knock-out depth where the panel draws it: windows count by their first layer and stand at their middle."""
    if width > 1:
        axis.set_xlabel(f"Middle of {width} layers; dotted: those from layer {depth['depth']}")
    return {**depth, **{name: depth[name] + (width - 1) / 2 for name in ("depth", "low", "high")}}


def _draw_readout(axis: Axes, record: Record) -> None:
    depths = record["readout"]["depths"]
    x = np.arange(len(depths))
    _draw_band(axis, x, percent_right(depths), {**MEASURED, "marker": "^"})
    control = [100 * parse_outcomes(run["control"]).mean() for run in depths]
    axis.plot(x, control, **CONTROL, label="control: shuffled labels")
    axis.set_xlabel("After layer")


def _draw_band(axis: Axes, x: np.ndarray, values: np.ndarray, style: dict[str, Any]) -> None:
    mean, low, high = mean_interval(values)
    axis.fill_between(x, low, high, color=style["color"], alpha=0.22, linewidth=0)
    axis.plot(x, mean, **style, label="measured, 95% band" if style is MEASURED else None)


def _draw_depth(axis: Axes, depth: dict[str, Any] | None) -> None:
    if depth is None:
        return
    if depth["depth"] is None:
        axis.text(0.98, 0.05, "no depth", transform=axis.transAxes, ha="right", color=GREY)
        return
    mark_depth(axis, depth, "fusion depth, 95% interval")


_DRAW_CURVE = {
    "attention": _draw_attention,
    "removal": _draw_removal,
    "knockout": _draw_knockout,
    "readout": _draw_readout,
}
