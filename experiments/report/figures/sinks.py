"""Sinks figure: in how many questions a layer has visual attention sinks, and how much attention they take."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.records.views import Record
from experiments.report.figures.record_part import require_part
from experiments.report.figures.style import CONTROL, GREY, MEASURED, SECOND, legend, make_panels, styled
from experiments.report.statistics import mean_interval


@styled
def sinks_figure(record: Record) -> Figure:
    """Draw the share of questions with a visual sink (left) and the attention of text on sinks (right), by layer.

    Bands are 95% bootstrap intervals over samples. The dash-dotted line is the instruction's attention on the whole image.

    Args:
        record: A finished record of an attention experiment.

    Raises:
        ValueError: if the record holds no visual sinks.
    """
    sinks = require_part(record, "sinks", "visual sinks")
    figure, (having, taking) = make_panels(2, columns=2, height=2.7, label="Percent")
    layers = len(sinks["by_attention"])
    x, every = np.arange(1, layers + 1), max(1, layers // 16)
    for name, style in (("by_attention", MEASURED), ("by_value", CONTROL)):
        mean, low, high = mean_interval(100.0 * (np.asarray(sinks[name]) > 0))
        having.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)
        label = f"sinks {name.replace('by_value', 'by value norm').replace('_', ' ')}"
        having.plot(x, mean, **style, markevery=every, label=label, clip_on=False)
    for target, values, style in zip(sinks["targets"], sinks["mass"], (MEASURED, SECOND), strict=False):
        mean, low, high = mean_interval(100 * np.asarray(values, dtype=float))
        taking.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)
        taking.plot(x, mean, **style | {"linestyle": ":"}, markevery=every, label=f"{target} on sinks")
    attention = record.get("attention")
    if attention is not None and ["instruction", "vision"] in attention["pairs"] and not sinks.get("left_out"):
        mass = np.asarray(attention["mass"][attention["pairs"].index(["instruction", "vision"])], dtype=float)
        taking.plot(x, 100 * mean_interval(mass)[0], color=GREY, linestyle="-.", label="instruction on the image")
    having.set_title("Questions with a visual sink", loc="left")
    taking.set_title("Attention", loc="left")
    for axis in (having, taking):
        axis.set_xlabel("Layer")
        axis.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        axis.set_xlim(0.6, layers + 0.4)
    having.set_ylim(0, 103)
    legend(figure, [having, taking], columns=3)
    return figure
