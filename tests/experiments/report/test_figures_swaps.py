"""Tests of the swaps figure in a report and beside a record."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.report.figure_entries import figure_entries
from experiments.report.figures import swaps_figure
from experiments.report.figures.record import draw_record
from tests.experiments.sample_records import LAYERS


def entry_of(layer: int | None, right: int) -> dict[str, Any]:
    """Return the entry of a property whose curves step at a layer, and have a band of 0.1."""
    step = [] if layer is None else [float(k < layer) for k in range(LAYERS + 1)]
    return {
        "layer": layer,
        "low": layer,
        "high": layer and layer + 1,
        "pairs": 40,
        "right": right,
        "chance": 0.01,
        "moved": step,
        "moved_low": [y - 0.1 for y in step],
        "moved_high": [y + 0.1 for y in step],
        "flipped": step[::-1],
    }


@pytest.fixture
def swapped(probed: dict[str, Any]) -> dict[str, Any]:
    properties = {"colour": entry_of(2, 39), "count": entry_of(None, 3), "place": entry_of(4, 30)}
    return probed | {"swaps": {"properties": properties}}


def test_swaps_figure_shows_move_and_flips_of_each_property_with_a_layer(swapped: dict[str, Any]) -> None:
    figure = swaps_figure(swapped)
    moved, flipped = figure.axes
    for axis, curve in ((moved, "moved"), (flipped, "flipped")):
        for line, name in zip(axis.lines[:2], ("colour", "place"), strict=True):
            expected = [(k, 100 * y) for k, y in enumerate(swapped["swaps"]["properties"][name][curve])]
            np.testing.assert_allclose(line.get_xydata(), expected)
    assert len(flipped.lines) == 2
    np.testing.assert_allclose(moved.lines[2].get_ydata(), 50)
    (band, _) = moved.collections
    (edge,) = band.get_paths()
    assert sorted({round(y) for x, y in edge.vertices if x == 1}) == [90, 110]
    labels = {text.get_text() for text in figure.legends[0].get_texts()}
    assert labels == {"colour: layer 2 (95% CI 2 to 3)", "place: layer 4 (95% CI 4 to 5)", "half"}
    with pytest.raises(ValueError, match="holds no swaps to draw"):
        swaps_figure(swapped | {"swaps": None})


def test_figure_entries_of_swaps_name_right_pairs_and_properties_without_a_layer(swapped: dict[str, Any]) -> None:
    (entry,) = (e for e in figure_entries([], [swapped], []) if e.stem == "swaps_by_property")
    assert entry.draw is not None
    assert "colour 39 of 40, count 3 of 40, place 30 of 40" in entry.caption
    assert "does not answer by it: count" in entry.caption


def test_figure_entries_without_swaps_do_not_mention_them(probed: dict[str, Any]) -> None:
    assert "swaps_by_property" not in {entry.stem for entry in figure_entries([], [probed], [])}


def test_draw_record_draws_swaps(
    swapped: dict[str, Any], write_records: Callable[[list[dict[str, Any]]], Path]
) -> None:
    parts = ("removal", "onset", "attention", "contribution", "sinks", "knockout", "readout", "fusion", "lens")
    swapped |= dict.fromkeys(parts)
    (path,) = (write_records([swapped]) / "records").iterdir()
    (png,) = draw_record(path)
    assert png.name == f"{swapped['id']}-swaps.png"
