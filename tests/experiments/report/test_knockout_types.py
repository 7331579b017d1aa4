"""Tests of knock-out by question type: its table and its figure, from outcomes with a known answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from experiments.report.figures import knockout_types_figure
from experiments.report.tables.knockout_types import knockout_types_tables

KINDS = ["place", "where"] * 50


@pytest.fixture
def record(probed: dict[str, Any]) -> dict[str, Any]:
    """Text reads places in layers 4 and 5, and in layer 2 where a thing is."""
    intact = "1" * 100
    no_places, no_where = "01" * 50, "10" * 50
    windows = [[], [0, 1], [1, 2], [3, 4], [4, 5]]
    correct = [intact, no_where, no_where, no_places, intact]
    runs = [{"layers": layers, "correct": text} for layers, text in zip(windows, correct, strict=True)]
    return probed | {"data": probed["data"] | {"kinds": KINDS}, "knockout": {"width": 2, "windows": runs}}


def test_table_names_the_layers_of_the_largest_loss_by_type(record: dict[str, Any]) -> None:
    (table,) = knockout_types_tables([record])
    columns = ["Question type", "n", "Layers of the largest loss", "Points lost"]
    assert table.text[columns].to_numpy().tolist() == [
        ["place", "50", "4 to 5", "+100.0 [+100.0, +100.0]"],
        ["where", "50", "1 to 2", "+100.0 [+100.0, +100.0]"],
    ]


def test_csv_has_the_loss_of_every_window(record: dict[str, Any]) -> None:
    (table,) = knockout_types_tables([record])
    places = table.data[table.data.kind == "place"]
    assert places[["first_layer", "last_layer"]].to_numpy().tolist() == [[1, 2], [2, 3], [4, 5], [5, 6]]
    assert places.lost.tolist() == [0, 0, 1, 0]


def test_records_without_knockout_make_no_table(record: dict[str, Any]) -> None:
    assert knockout_types_tables([record | {"knockout": None}]) == ()


def test_figure_has_a_panel_for_each_type_with_its_own_outcomes(record: dict[str, Any]) -> None:
    figure = knockout_types_figure(record)
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["place (n = 50)", "where (n = 50)"]
    curves = [axis.get_lines()[0].get_xydata() for axis in figure.axes]
    np.testing.assert_allclose(curves[0], [[1.5, 100], [2.5, 100], [4.5, 0], [5.5, 100]])
    np.testing.assert_allclose(curves[1], [[1.5, 0], [2.5, 0], [4.5, 100], [5.5, 100]])


def test_figure_of_a_record_without_knockout_raises(record: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=record["id"]):
        knockout_types_figure(record | {"knockout": None})
