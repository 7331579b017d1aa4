"""Attention figures: mass and entropy between token groups by layer (paper, Figs. 2 and 3), with controls."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.records.views import Record
from experiments.report.figures.record_part import require_part
from experiments.report.figures.style import BLACK, BLUE, CONTROL, MEASURED, ORANGE, legend, make_panels, styled
from experiments.report.statistics import mean_interval

_SINKS: dict[str, Any] = {"color": ORANGE, "marker": "v", "linestyle": "none", "markersize": 5}


def attention_figure(record: Record) -> Figure:
    """Draw the share of a query's attention that falls on a token group, by layer; one panel for each pair of groups.

    The line is the mean over heads and samples, the band a 95% bootstrap interval over samples. The controls are the same
    model with random weights, and uniform attention over all visible tokens. Triangles at the top of panels on vision mark
    layers in which half of the questions have a visual sink.

    Args:
        record: A finished record of an attention experiment.

    Raises:
        ValueError: if the record holds no attention.
    """
    return _draw_by_layer(record, "mass", "Attention mass (%)", 100.0, "uniform attention")


def entropy_figure(record: Record) -> Figure:
    """Draw the entropy (nats) of the attention within a token group by layer, in the style of `attention_figure`.

    The dotted line is the entropy of uniform attention over the group: the upper bound.

    Args:
        record: A finished record of an attention experiment.

    Raises:
        ValueError: if the record holds no attention.
    """
    return _draw_by_layer(record, "entropy", "Entropy (nats)", 1.0, "uniform attention (upper bound)")


@styled
def _draw_by_layer(record: Record, key: str, label: str, scale: float, uniform_label: str) -> Figure:
    attention = require_part(record, "attention", "attention")
    values = np.asarray(attention[key], dtype=float) * scale
    control = attention.get("control") or {}
    uniform = attention.get(f"uniform_{key}")
    pairs, layers, samples = values.shape
    mean, low, high = (part.reshape(pairs, layers) for part in mean_interval(values.reshape(-1, samples)))
    x = np.arange(1, layers + 1)
    every = max(1, layers // 16)
    sinks = (record.get("sinks") or {}).get("by_attention")
    with_sinks = x[:0] if sinks is None else x[(np.asarray(sinks) > 0).mean(1) >= 0.5]

    figure, axes = make_panels(pairs, columns=2 if pairs == 4 else 3, height=2.5, label=label)
    for index, (axis, (target, source)) in enumerate(zip(axes, attention["pairs"], strict=True)):
        axis.fill_between(x, low[index], high[index], color=BLUE, alpha=0.22, linewidth=0)
        axis.plot(x, mean[index], **MEASURED, markevery=every, label="measured, 95% band")
        if control.get(key) is not None:
            line = np.asarray(control[key][index], dtype=float) * scale
            axis.plot(x, line, **CONTROL, markevery=every, label=f"control: {control.get('name', 'random weights')}")
        if uniform is not None and uniform[index] is not None:
            axis.axhline(uniform[index] * scale, color=BLACK, linestyle=":", linewidth=1.2, label=uniform_label)
        if source == "vision" and len(with_sinks):
            top = np.full(len(with_sinks), 0.97)
            axis.plot(with_sinks, top, **_SINKS, transform=axis.get_xaxis_transform(), label="layer with visual sinks")
        axis.set_title(f"{target.capitalize()} → {source}", loc="left")
        axis.set_xlabel("Layer of the language model")
        axis.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        axis.set_xlim(0.6, layers + 0.4)
    axes[0].set_ylim(bottom=0)
    legend(figure, axes, columns=3)
    return figure
