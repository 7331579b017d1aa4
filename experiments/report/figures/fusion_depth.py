"""The curves that locate fusion, side by side: attention, removal, knock-out and read-out, each with its depth."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.records.views import Record, first_layers, outcomes, percent_right
from experiments.report.figures.style import BLACK, CONTROL, GREY, MEASURED, SECOND, legend, mark_depth, panels, styled
from experiments.report.statistics import mean_interval

TITLES = {
    "attention": "Attention, instruction → vision",
    "removal": "Removal: vision hidden from a layer on",
    "knockout": "Knock-out: text cut off from vision",
    "readout": "Read-out of the answer from the question",
}


@styled
def fusion_figure(record: Record) -> Figure:
    """One panel for each curve that the record holds; bands are 95% bootstrap intervals over examples, the green line
    and range the curve's fusion depth with its interval. Raises ValueError if it holds none."""
    present = [kind for kind in TITLES if record.get(kind) is not None]
    if not present:
        raise ValueError(f"record {record['id']} holds no curve that locates fusion")
    figure, axes = panels(len(present), columns=2, height=2.3, label="Percent")
    for axis, kind in zip(axes, present, strict=True):
        _DRAW[kind](axis, record)
        axis.set_title(TITLES[kind], loc="left")
        axis.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True))
        axis.set_xlim(-0.3, record["model"]["layers"] + 0.3)
        _depth(axis, (record.get("fusion") or {}).get(kind))
    axes[0].set_ylim(0, 103)
    legend(figure, axes, columns=3)
    return figure


def _attention(axis: Axes, record: Record) -> None:
    attention = record["attention"]
    pair = attention["pairs"].index(["instruction", "vision"])
    mass = 100 * np.asarray(attention["mass"][pair], dtype=float)
    _band(axis, np.arange(1, len(mass) + 1), mass, MEASURED)
    axis.set_xlabel("Layer")


def _removal(axis: Axes, record: Record) -> None:
    _band(axis, np.asarray(first_layers(record)), percent_right(record["removal"]["onward"]), SECOND)
    axis.set_xlabel("First layers that still see vision")


def _knockout(axis: Axes, record: Record) -> None:
    intact, *windows = record["knockout"]["windows"]
    middle = np.array([(min(run["layers"]) + max(run["layers"])) / 2 + 1 for run in windows])
    _band(axis, middle, percent_right(windows), {**SECOND, "marker": "v"})
    axis.axhline(float(percent_right([intact]).mean()), color=BLACK, linestyle="-", linewidth=1.1, label="intact")
    width = record["knockout"]["width"]
    axis.set_xlabel("Layer" if width == 1 else f"Middle of {width} layers")


def _readout(axis: Axes, record: Record) -> None:
    depths = record["readout"]["depths"]
    x = np.arange(len(depths))
    _band(axis, x, percent_right(depths), {**MEASURED, "marker": "^"})
    control = [100 * outcomes(run["control"]).mean() for run in depths]
    axis.plot(x, control, **CONTROL, label="control: shuffled labels")
    axis.set_xlabel("After layer")


def _band(axis: Axes, x: np.ndarray, values: np.ndarray, style: dict[str, Any]) -> None:
    mean, low, high = mean_interval(values)
    axis.fill_between(x, low, high, color=style["color"], alpha=0.22, linewidth=0)
    axis.plot(x, mean, **style, label="measured, 95% band" if style is MEASURED else None)


def _depth(axis: Axes, depth: dict[str, Any] | None) -> None:
    if depth is None:
        return
    if depth["depth"] is None:
        axis.text(0.98, 0.05, "no depth", transform=axis.transAxes, ha="right", color=GREY)
        return
    mark_depth(axis, depth, "fusion depth, 95% interval")


_DRAW = {"attention": _attention, "removal": _removal, "knockout": _knockout, "readout": _readout}
