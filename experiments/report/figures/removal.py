"""Accuracy without visual tokens, by layer (paper, Fig. 5), with controls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.records.views import Record, first_layers, outcomes, percent_right
from experiments.report.figures.style import CONTROL, MEASURED, REFERENCES, SECOND, legend, mark_depth, panels, styled
from experiments.report.statistics import mean_interval

_ROOM = 36  # characters of tick labels that lie side by side without touching


@styled
def removal_figure(record: Record) -> Figure:
    """Accuracy with the visual tokens hidden inside one block of layers (left) and from a layer onward (right).

    Bars and band: 95% bootstrap intervals over examples. Horizontal lines: accuracy intact, with a blank image, and of
    a text-only guess. On the right, the fusion depth with its interval. Raises ValueError if nothing was removed.
    """
    removal = record.get("removal")
    if removal is None:
        raise ValueError(f"record {record['id']} holds no removal of visual tokens to draw")
    figure, (inside, onward) = panels(2, columns=2, height=3.0, label="Accuracy (%)")

    names = [_block(run["layers"]) for run in removal["inside"]]
    x = np.arange(len(names))
    _points(inside, x, removal["inside"], {**MEASURED, "label": "hidden inside one block"})
    if removal.get("random_inside") is not None:
        positions = [names.index(_block(run["layers"])) for run in removal["random_inside"]]
        style = {**CONTROL, "label": "control: random text tokens hidden"}
        _points(inside, np.asarray(positions) + 0.12, removal["random_inside"], style)
    every = -(-len(names) // 12)
    inside.set_xticks(x[::every], names[::every])
    if sum(map(len, names[::every])) > _ROOM:
        inside.tick_params(axis="x", labelrotation=40)
    inside.set_xlim(-0.5, len(names) - 0.5)
    inside.set_xlabel("Layers in which visual tokens are hidden")

    seen = np.asarray(first_layers(record))
    mean, low, high = _intervals(removal["onward"])
    onward.fill_between(seen, low, high, color=SECOND["color"], alpha=0.22, linewidth=0)
    onward.plot(seen, mean, **SECOND, label="hidden from a layer onward")
    depth = (record.get("fusion") or {}).get("removal")
    if depth is not None and depth["depth"] is not None:
        mark_depth(onward, depth, f"fusion depth {depth['depth']} (95% CI {depth['low']:g} to {depth['high']:g})")
    onward.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True))
    onward.set_xlabel("First layers that still see the visual tokens")

    for axis in (inside, onward):
        _references(axis, record)
    legend(figure, [inside, onward], columns=3)
    return figure


def _references(axis: Axes, record: Record) -> None:
    texts = {
        "intact": record["accuracy"]["image"],
        "blank image": record["accuracy"].get("blank"),
        "text-only guess": record["data"].get("guess"),
    }
    for (label, text), style in zip(texts.items(), REFERENCES, strict=True):
        if text is not None:
            axis.axhline(100 * outcomes(text).mean(), **style, linewidth=1.1, zorder=1.5, label=label)


def _points(axis: Axes, x: np.ndarray, runs: Sequence[Any], style: dict[str, Any]) -> None:
    mean, low, high = _intervals(runs)
    axis.errorbar(x, mean, yerr=(mean - low, high - mean), **style, capsize=2, elinewidth=1)


def _intervals(runs: Sequence[Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return mean_interval(percent_right(runs))


def _block(layers: Sequence[int]) -> str:
    first, last = min(layers) + 1, max(layers) + 1
    # An en dash, as printed ranges have.
    return f"{first}" if first == last else f"{first}\u2013{last}"
