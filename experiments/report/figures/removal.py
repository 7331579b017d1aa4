"""Removal figure: accuracy without visual tokens, by layer (paper, Fig. 5), with controls and the onset curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.records.views import Record, layers_with_vision, parse_outcomes, percent_right
from experiments.report.figures.record_part import require_part
from experiments.report.figures.style import (
    BLUE,
    CONTROL,
    MEASURED,
    REFERENCES,
    SECOND,
    legend,
    make_panels,
    mark_depth,
    styled,
)
from experiments.report.statistics import mean_interval

_LABEL_CHARACTERS = 36
"""Most characters of tick labels that fit side by side on the x axis."""


@styled
def removal_figure(record: Record) -> Figure:
    """Draw accuracy with visual tokens hidden inside one block of layers (left) and from a layer onward (right).

    Bars and band are 95% bootstrap intervals over examples. Horizontal lines are the accuracy of the intact model, with a
    blank image, and of the text-only guess. The right panel marks the fusion depth with its interval. If the record holds
    the onset curve, it also shows accuracy with visual tokens hidden in the first layers, and marks the onset.

    Args:
        record: A finished record of an attention experiment.

    Raises:
        ValueError: if the record holds no removal of visual tokens.
    """
    removal = require_part(record, "removal", "removal of visual tokens")
    figure, (inside, onward) = make_panels(2, columns=2, height=3.0, label="Accuracy (%)")

    names = [_block_name(run["layers"]) for run in removal["inside"]]
    x = np.arange(len(names))
    _draw_points(inside, x, removal["inside"], {**MEASURED, "label": "hidden inside one block"})
    if removal.get("random_inside") is not None:
        positions = [names.index(_block_name(run["layers"])) for run in removal["random_inside"]]
        style = {**CONTROL, "label": "control: random text tokens hidden"}
        _draw_points(inside, np.asarray(positions) + 0.12, removal["random_inside"], style)
    every = -(-len(names) // 12)
    inside.set_xticks(x[::every], names[::every])
    if sum(map(len, names[::every])) > _LABEL_CHARACTERS:
        inside.tick_params(axis="x", labelrotation=40)
    inside.set_xlim(-0.5, len(names) - 0.5)
    inside.set_xlabel("Layers in which visual tokens are hidden")

    first_layers = np.asarray(layers_with_vision(record))
    mean, low, high = mean_interval(percent_right(removal["onward"]))
    onward.fill_between(first_layers, low, high, color=SECOND["color"], alpha=0.22, linewidth=0)
    onward.plot(first_layers, mean, **SECOND, label="hidden from a layer onward")
    depth = (record.get("fusion") or {}).get("removal")
    if depth is not None and depth["depth"] is not None:
        mark_depth(onward, depth, f"fusion depth {depth['depth']} (95% CI {depth['low']:g} to {depth['high']:g})")
    onward.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True))
    onward.set_xlabel("First layers that attend to the visual tokens")
    if onset := record.get("onset"):
        _draw_onset(onward, onset["upto"], onset.get("estimate"))
        onward.set_xlabel("First layers, with visual tokens in these alone or in all others")

    for axis in (inside, onward):
        _draw_references(axis, record)
    legend(figure, [inside, onward], columns=3)
    return figure


def _draw_onset(axis: Axes, runs: Sequence[Any], estimate: Mapping[str, Any] | None) -> None:
    """Draw accuracy with visual tokens hidden in the first layers, by their number, and mark the onset."""
    mean, low, high = mean_interval(percent_right(runs))
    hidden = [len(run["layers"]) for run in runs]
    axis.fill_between(hidden, low, high, color=BLUE, alpha=0.18, linewidth=0)
    axis.plot(hidden, mean, color=BLUE, marker="^", linestyle="--", label="hidden up to a layer")
    if estimate is not None and estimate["onset"] is not None:
        label = f"onset {estimate['onset']} (95% CI {estimate['low']:g} to {estimate['high']:g})"
        axis.axvspan(estimate["low"] - 0.04, estimate["high"] + 0.04, color=BLUE, alpha=0.1, linewidth=0)
        axis.axvline(estimate["onset"], color=BLUE, linestyle=(0, (1, 2)), linewidth=1.2, label=label)


def _draw_references(axis: Axes, record: Record) -> None:
    texts = {
        "intact": record["accuracy"]["image"],
        "blank image": record["accuracy"].get("blank"),
        "text-only guess": record["data"].get("guess"),
    }
    for (label, text), style in zip(texts.items(), REFERENCES, strict=True):
        if text is not None:
            axis.axhline(100 * parse_outcomes(text).mean(), **style, linewidth=1.1, zorder=1.5, label=label)


def _draw_points(axis: Axes, x: np.ndarray, runs: Sequence[Any], style: dict[str, Any]) -> None:
    mean, low, high = mean_interval(percent_right(runs))
    axis.errorbar(x, mean, yerr=(mean - low, high - mean), **style, capsize=2, elinewidth=1)


def _block_name(layers: Sequence[int]) -> str:
    first, last = min(layers) + 1, max(layers) + 1
    # An en dash, as in printed ranges.
    return f"{first}" if first == last else f"{first}\u2013{last}"
