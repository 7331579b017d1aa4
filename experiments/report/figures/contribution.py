"""Contribution figure: how much the image adds to text by layer, beside its attention mass, and by head."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.records.views import Record
from experiments.report.figures.style import BLUE, CONTROL, GREY, MEASURED, WIDTH, ReportFigure, legend, styled
from experiments.report.statistics import mean_interval


@styled
def contribution_figure(record: Record) -> Figure:
    """Draw the image's share of what attention adds to each text target, by layer, and its norm by layer and head.

    The line is the mean over samples, the band a 95% bootstrap interval over samples. The dash-dotted line is the attention
    mass on the image, the dashed one the share in the same model with random weights. The last panel shows the norm of
    what the image adds to the instruction for each head, as a mean over samples.

    Args:
        record: A finished record of an attention experiment.

    Raises:
        ValueError: if the record holds no contribution of vision.
    """
    contribution = record.get("contribution")
    pairs = [tuple(pair) for pair in contribution["pairs"]] if contribution else []
    visual = [number for number, (_, source) in enumerate(pairs) if source == "vision"]
    if contribution is None or not visual:
        raise ValueError(f"record {record['id']} holds no contribution of vision to draw")
    figure = ReportFigure(figsize=(WIDTH, 2.9), layout="constrained")
    axes = figure.subplots(1, len(visual) + 1, width_ratios=[1] * len(visual) + [1.1])
    for axis, number in zip(axes, visual, strict=False):
        _draw_share(axis, record, contribution, number)
        axis.set_title(f"{pairs[number][0].capitalize()} \u2190 vision", loc="left")
    top = max(axis.get_ylim()[1] for axis in axes[:-1])
    for axis in axes[:-1]:
        axis.set_ylim(0, top)
    axes[0].set_ylabel("Percent of the target's total")
    _draw_heads(figure, axes[-1], contribution["by_head"][visual[0]])
    legend(figure, list(axes[:-1]), columns=3)
    return figure


def _draw_share(axis: Axes, record: Record, contribution: Any, number: int) -> None:
    share = 100 * np.asarray(contribution["share"][number], dtype=float)
    x = np.arange(1, len(share) + 1)
    every = max(1, len(x) // 16)
    mean, low, high = mean_interval(share)
    axis.fill_between(x, low, high, color=BLUE, alpha=0.22, linewidth=0)
    axis.plot(x, mean, **MEASURED, markevery=every, label="contribution, 95% band")
    control = contribution.get("control") or {}
    if control.get("share") is not None:
        line = 100 * np.asarray(control["share"][number], dtype=float)
        axis.plot(x, line, **CONTROL, markevery=every, label=f"contribution: {control.get('name', 'random weights')}")
    attention = record.get("attention")
    if attention is not None and contribution["pairs"][number] in attention["pairs"]:
        mass = np.asarray(attention["mass"][attention["pairs"].index(contribution["pairs"][number])], dtype=float)
        axis.plot(x, 100 * mean_interval(mass)[0], color=GREY, linestyle="-.", label="attention mass")
    axis.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axis.set_xlim(0.6, len(x) + 0.4)
    axis.set_xlabel("Layer")


def _draw_heads(figure: Figure, axis: Axes, by_head: Any) -> None:
    norms = np.asarray(by_head, dtype=float)  # [layers, heads]
    layers, heads = norms.shape
    image = axis.imshow(
        norms.T, aspect="auto", origin="lower", cmap="Blues", vmin=0, extent=(0.5, layers + 0.5, 0.5, heads + 0.5)
    )
    axis.grid(visible=False)
    axis.set_title("Norm by head", loc="left")
    axis.set_xlabel("Layer")
    axis.set_ylabel("Head")
    for ticks in (axis.xaxis, axis.yaxis):
        ticks.set_major_locator(MaxNLocator(nbins=8, integer=True))
    figure.colorbar(image, ax=axis, shrink=0.9)
