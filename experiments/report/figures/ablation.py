"""Ablation figure: accuracy by visual tokens, pre-fusion depth and compressor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.records.views import parse_outcomes
from experiments.report.figures.style import (
    LINESTYLES,
    MARKERS,
    ORANGE,
    ORDERED,
    REFERENCES,
    legend,
    make_panels,
    styled,
)
from experiments.report.run_groups import RunGroup


@styled
def ablation_figure(groups: Sequence[RunGroup]) -> Figure:
    """Draw accuracy by number of visual tokens: one panel for each compressor, one line for each pre-fusion depth.

    Bars are 95% bootstrap intervals over examples and seeds. Horizontal lines are plain LLaVA, LLaVA with a blank image,
    and the text-only guess. A cross at the bottom marks a configuration that failed.

    Args:
        groups: Run groups of the same family, trained alike on the same data.

    Raises:
        ValueError: if no group is finished.
    """
    if not any(group.finished for group in groups):
        raise ValueError("no finished ablation cell to draw")
    swept = [group for group in groups if not group.is_baseline] or list(groups)
    tokens = sorted({group.visual_tokens for group in swept if group.visual_tokens is not None})
    compressors = sorted({group.compressor for group in swept})
    figure, axes = make_panels(len(compressors), columns=3, height=3.0, label="Accuracy (%)")
    series = series_styles(swept)
    for axis, compressor in zip(axes, compressors, strict=True):
        for index, ((layers, settings), style) in enumerate(series.items()):
            line = [
                g for g in swept if (g.compressor, g.prefusion_layers, g.settings) == (compressor, layers, settings)
            ]
            offset = min(0.09, 0.5 / len(series)) * (index - (len(series) - 1) / 2)
            _draw_line(axis, line, tokens, offset, style)
        draw_references(axis, groups)
        axis.set_title(
            "No compression" if compressor == "none" else f"{compressor.capitalize()} compressor", loc="left"
        )
        axis.set_xticks(range(len(tokens)), [f"{count:.4g}" for count in tokens])
        axis.set_xlim(-0.5, len(tokens) - 0.5)
        axis.set_xlabel("Visual tokens per image")
    legend(figure, axes, columns=3)
    return figure


def series_styles(groups: Sequence[RunGroup]) -> dict[tuple[int, str], dict[str, Any]]:
    """Return a line style for each (pre-fusion depth, differing settings), the same in all figures of an ablation."""
    styles = {}
    for index, key in enumerate(sorted({(group.prefusion_layers, group.settings) for group in groups})):
        layers, settings = key
        name = "no pre-fusion" if layers == 0 else f"{layers} pre-fusion layer{'s' if layers > 1 else ''}"
        styles[key] = {
            "color": ORDERED[index % len(ORDERED)],
            "marker": MARKERS[index % len(MARKERS)],
            "linestyle": LINESTYLES[index % len(LINESTYLES)],
            "label": f"{name}, {settings}" if settings else name,
        }
    return styles


def draw_references(axis: Axes, groups: Sequence[RunGroup]) -> None:
    """Draw horizontal lines for plain LLaVA, LLaVA with a blank image, and the text-only guess."""
    for baseline in groups:
        if not baseline.is_baseline or baseline.accuracy is None:
            continue
        suffix = f", {baseline.settings}" if baseline.settings else ""
        blank, guess = baseline.outcomes("blank"), baseline.finished[0]["data"].get("guess")
        values = {
            f"LLaVA, {baseline.visual_tokens:.4g} tokens{suffix}": baseline.accuracy.mean,
            f"LLaVA, blank image{suffix}": None if blank is None else blank.mean(),
            f"text-only guess{suffix}": None if guess is None else parse_outcomes(guess).mean(),
        }
        for (label, value), style in zip(values.items(), REFERENCES, strict=True):
            if value is not None:
                axis.axhline(100 * value, **style, linewidth=1.1, zorder=1.5, label=label)


def _draw_line(
    axis: Axes, groups: Sequence[RunGroup], tokens: list[float], offset: float, style: dict[str, Any]
) -> None:
    # A failed group without compressor has no token count and therefore no position on the axis.
    points = [(tokens.index(g.visual_tokens) + offset, g.accuracy) for g in groups if g.visual_tokens is not None]
    finished = sorted((x, accuracy) for x, accuracy in points if accuracy is not None)
    if finished:
        x, accuracies = zip(*finished, strict=True)
        mean, low, high = 100 * np.asarray(accuracies).T
        axis.errorbar(x, mean, yerr=(mean - low, high - mean), **style, capsize=2, elinewidth=1)
    failed = [x for x, accuracy in points if accuracy is None]
    if failed:
        cross: dict[str, Any] = {
            "color": ORANGE,
            "marker": "x",
            "linestyle": "none",
            "markersize": 6,
            "markeredgewidth": 1.6,
        }
        bottom = np.full(len(failed), 0.03)
        axis.plot(failed, bottom, **cross, transform=axis.get_xaxis_transform(), clip_on=False, label="failed")
