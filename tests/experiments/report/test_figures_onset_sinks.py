"""Tests of what figures show of onset, contribution and visual sinks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from experiments.report import figures


def line(axis: Axes, label: str) -> Line2D:
    found = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))[label]
    return found[0] if isinstance(found, tuple) else found


def values(axis: Axes, label: str) -> np.ndarray:
    return np.asarray(line(axis, label).get_ydata(), dtype=float)


def test_removal_figure_shows_late_arrival_and_marks_the_onset(probed: dict[str, Any]) -> None:
    probed["onset"]["estimate"] |= {"onset": 2, "low": 1, "high": 4}
    axis = figures.removal_figure(probed).axes[1]
    late = [run["correct"].count("1") / 1.2 for run in probed["onset"]["upto"]]
    np.testing.assert_allclose(values(axis, "hidden up to a layer"), late)
    assert list(line(axis, "onset 2 (95% CI 1 to 4)").get_xdata()) == [2, 2]
    probed["onset"]["estimate"] |= {"onset": None, "low": None, "high": None}
    names = figures.removal_figure(probed).axes[1].get_legend_handles_labels()[1]
    assert not any(name.startswith("onset") for name in names)


def test_contribution_figure_shows_share_mass_control_and_norms_by_head(probed: dict[str, Any]) -> None:
    *shares, heads, _ = figures.contribution_figure(probed).axes
    assert [axis.get_title("left") for axis in shares] == ["Instruction \u2190 vision", "Response \u2190 vision"]
    for number, axis in enumerate(shares):
        share = np.asarray(probed["contribution"]["share"][number])
        np.testing.assert_allclose(values(axis, "contribution, 95% band"), 100 * share.mean(-1))
        mass = np.asarray(probed["attention"]["mass"][number], dtype=float)
        np.testing.assert_allclose(values(axis, "attention mass"), 100 * np.nanmean(mass, -1))
        np.testing.assert_allclose(values(axis, "contribution: same model, random weights"), 50.0)
    assert len({axis.get_ylim() for axis in shares}) == 1
    assert shares[0].get_ylim()[1] > max(line.get_ydata().max() for axis in shares for line in axis.lines)
    np.testing.assert_allclose(heads.images[0].get_array(), np.transpose(probed["contribution"]["by_head"][0]))


def test_sinks_figure_shows_questions_with_sinks_and_attention_on_them(probed: dict[str, Any]) -> None:
    having, taking = figures.sinks_figure(probed).axes
    with_sink = np.asarray(probed["sinks"]["by_attention"]) > 0
    np.testing.assert_allclose(values(having, "sinks by attention"), 100 * with_sink.mean(-1))
    np.testing.assert_allclose(values(taking, "instruction on sinks"), 10 * with_sink.mean(-1))
    np.testing.assert_allclose(values(taking, "response on sinks"), 5 * with_sink.mean(-1))


def test_attention_figure_marks_layers_in_which_half_of_the_questions_have_a_sink(probed: dict[str, Any]) -> None:
    with_sink = np.asarray(probed["sinks"]["by_attention"]) > 0
    expected = [layer for layer in range(1, 7) if with_sink[layer - 1].mean() >= 0.5]
    assert 0 < len(expected) < 6
    first, _, third = figures.attention_figure(probed).axes
    assert list(line(first, "layer with visual sinks").get_xdata()) == expected
    assert "layer with visual sinks" not in third.get_legend_handles_labels()[1], "its source is the instruction"


def test_figures_without_contribution_or_sinks_raise(records: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="holds no contribution"):
        figures.contribution_figure(records[0])
    with pytest.raises(ValueError, match="holds no visual sinks"):
        figures.sinks_figure(records[0])
