"""Knock-out figure by question type: which layers text needs to read the image in, for each type of question."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.records.views import Record, percent_right, window_middles
from experiments.report.figures.record_part import require_part
from experiments.report.figures.style import BLACK, SECOND, legend, make_panels, styled
from experiments.report.statistics import mean_interval


@styled
def knockout_types_figure(record: Record) -> Figure:
    """Draw accuracy with text cut off from the image in each window of layers, one panel for each type of question.

    Bands are 95% bootstrap intervals over the questions of the type.

    Args:
        record: A finished record with knock-out.

    Raises:
        ValueError: If the record holds no knock-out.
    """
    knockout = require_part(record, "knockout", "knock-out")
    intact, *windows = knockout["windows"]
    middle = window_middles(windows)
    right, right_intact = percent_right(windows), percent_right([intact])[0]
    kinds = np.array(record["data"]["kinds"])
    names = sorted(set(kinds))
    figure, axes = make_panels(len(names), columns=3, height=1.9, label="Accuracy (%)")
    for axis, name in zip(axes, names, strict=True):
        of_type = kinds == name
        mean, low, high = mean_interval(right[:, of_type])
        axis.fill_between(middle, low, high, color=SECOND["color"], alpha=0.22, linewidth=0)
        axis.plot(middle, mean, **(SECOND | {"markersize": 2.5}), label="text cut off from the image, 95% band")
        axis.axhline(right_intact[of_type].mean(), color=BLACK, linestyle="-", linewidth=1.1, label="intact")
        axis.set_title(f"{name} (n = {of_type.sum()})", loc="left")
        axis.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
        axis.set_xlim(0.5, record["model"]["layers"] + 0.5)
        axis.set_ylim(0, 103)
    width = knockout["width"]
    for axis in axes[-3:]:
        axis.set_xlabel("Layer" if width == 1 else f"Middle of {width} layers")
    legend(figure, axes, columns=2)
    return figure
