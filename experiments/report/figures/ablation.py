"""Accuracy over the axes of an ablation: visual tokens, pre-fusion depth, compressor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.records.views import outcomes
from experiments.report.figures.style import LINESTYLES, MARKERS, ORANGE, ORDERED, REFERENCES, legend, panels, styled
from experiments.report.run_groups import Cell


@styled
def ablation_figure(cells: Sequence[Cell]) -> Figure:
    """Accuracy by number of visual tokens, one panel for each compressor, one line for each pre-fusion depth.

    Bars: 95% bootstrap intervals over examples and seeds. Horizontal lines: plain LLaVA, LLaVA with a blank image, and
    a text-only guess. A cross at the foot marks a cell that failed. Raises ValueError without a finished cell.
    """
    if not any(cell.finished for cell in cells):
        raise ValueError("no finished ablation cell to draw")
    swept = [cell for cell in cells if not cell.is_baseline] or list(cells)
    tokens = sorted({cell.visual_tokens for cell in swept if cell.visual_tokens is not None})
    compressors = sorted({cell.compressor for cell in swept})
    figure, axes = panels(len(compressors), columns=3, height=3.0, label="Accuracy (%)")
    series = series_styles(swept)
    for axis, compressor in zip(axes, compressors, strict=True):
        for index, ((layers, settings), style) in enumerate(series.items()):
            chosen = [
                c for c in swept if (c.compressor, c.prefusion_layers, c.settings) == (compressor, layers, settings)
            ]
            offset = min(0.09, 0.5 / len(series)) * (index - (len(series) - 1) / 2)
            _draw(axis, chosen, tokens, offset, style)
        draw_references(axis, cells)
        axis.set_title(
            "No compression" if compressor == "none" else f"{compressor.capitalize()} compressor", loc="left"
        )
        axis.set_xticks(range(len(tokens)), [str(count) for count in tokens])
        axis.set_xlim(-0.5, len(tokens) - 0.5)
        axis.set_xlabel("Visual tokens an image")
    legend(figure, axes, columns=3)
    return figure


def series_styles(cells: Sequence[Cell]) -> dict[tuple[int, str], dict[str, Any]]:
    """A line style for each pre-fusion depth (and other settings that differ), the same in every figure of a sweep."""
    styles = {}
    for index, key in enumerate(sorted({(cell.prefusion_layers, cell.settings) for cell in cells})):
        layers, settings = key
        name = "no pre-fusion" if layers == 0 else f"{layers} pre-fusion layer{'s' if layers > 1 else ''}"
        styles[key] = {
            "color": ORDERED[index % len(ORDERED)],
            "marker": MARKERS[index % len(MARKERS)],
            "linestyle": LINESTYLES[index % len(LINESTYLES)],
            "label": f"{name}, {settings}" if settings else name,
        }
    return styles


def draw_references(axis: Axes, cells: Sequence[Cell]) -> None:
    """Horizontal lines for the controls: plain LLaVA, LLaVA with a blank image, text-only guess."""
    for baseline in cells:
        if not baseline.is_baseline or baseline.accuracy is None:
            continue
        suffix = f", {baseline.settings}" if baseline.settings else ""
        blank, guess = baseline.outcomes("blank"), baseline.finished[0]["data"].get("guess")
        values = {
            f"LLaVA, {baseline.visual_tokens} tokens{suffix}": baseline.accuracy.mean,
            f"LLaVA, blank image{suffix}": None if blank is None else blank.mean(),
            f"text-only guess{suffix}": None if guess is None else outcomes(guess).mean(),
        }
        for (label, value), style in zip(values.items(), REFERENCES, strict=True):
            if value is not None:
                axis.axhline(100 * value, **style, linewidth=1.1, zorder=1.5, label=label)


def _draw(axis: Axes, cells: Sequence[Cell], tokens: list[int], offset: float, style: dict[str, Any]) -> None:
    # A failed cell without compressor does not know its number of tokens and has no place on the axis.
    placed = [(tokens.index(c.visual_tokens) + offset, c.accuracy) for c in cells if c.visual_tokens is not None]
    finished = sorted((x, accuracy) for x, accuracy in placed if accuracy is not None)
    if finished:
        x, accuracies = zip(*finished, strict=True)
        mean, low, high = 100 * np.asarray(accuracies).T
        axis.errorbar(x, mean, yerr=(mean - low, high - mean), **style, capsize=2, elinewidth=1)
    failed = [x for x, accuracy in placed if accuracy is None]
    if failed:
        marks: dict[str, Any] = {
            "color": ORANGE,
            "marker": "x",
            "linestyle": "none",
            "markersize": 6,
            "markeredgewidth": 1.6,
        }
        foot = np.full(len(failed), 0.03)
        axis.plot(failed, foot, **marks, transform=axis.get_xaxis_transform(), clip_on=False, label="failed")
