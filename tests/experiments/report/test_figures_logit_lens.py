"""Tests of the logit-lens figure in a report and beside a record."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.report.figure_entries import figure_entries
from experiments.report.figures import lens_figure
from experiments.report.figures.record import draw_record


def test_lens_figure_shows_accuracy_above_and_log_probability_below(probed: dict[str, Any]) -> None:
    figure = lens_figure(probed)
    above, below = figure.axes
    curve, guess = above.lines
    rates = [run["correct"].count("1") / 1.2 for run in probed["lens"]["depths"]]
    np.testing.assert_allclose(curve.get_ydata(), rates)
    np.testing.assert_allclose(guess.get_ydata(), probed["data"]["guess"].count("1") / 1.2)
    (band,) = above.collections
    (edge,) = band.get_paths()
    for layer, rate in enumerate(rates):
        error = 1.96 * np.sqrt(rate * (100 - rate) / 120)
        low, *_, high = sorted(y for x, y in edge.vertices if x == layer)
        assert (low, high) == pytest.approx((rate - error, rate + error), abs=2)
    (drawn,) = below.lines
    np.testing.assert_allclose(drawn.get_xydata(), [(k, -4.5 + 0.7 * k) for k in range(7)])
    assert below.get_ylim()[1] == 0
    del probed["data"]["guess"]
    assert [text.get_text() for text in lens_figure(probed).legends[0].get_texts()] == ["measured, 95% band"]
    with pytest.raises(ValueError, match="holds no logit lens to draw"):
        lens_figure(probed | {"lens": None})


def test_figure_entries_missing_lens_gives_the_recorded_reason(probed: dict[str, Any]) -> None:
    probed |= {"lens": None, "lens_note": "this model has no head"}
    (caption,) = (e.caption for e in figure_entries([], [probed], []) if e.stem == "lens_by_layer")
    assert caption == "Not drawn: no finished record holds lens measurements (this model has no head)."


def test_draw_record_draws_only_recorded_probes(
    probed: dict[str, Any], write_records: Callable[[list[dict[str, Any]]], Path]
) -> None:
    parts = ("removal", "onset", "attention", "contribution", "sinks", "knockout", "readout", "fusion")
    probed |= dict.fromkeys(parts)
    (path,) = (write_records([probed]) / "records").iterdir()
    (png,) = draw_record(path)
    assert (png.name, png.parent) == (f"{probed['id']}-lens.png", path.parents[1] / "figures")
