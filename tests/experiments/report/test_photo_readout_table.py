"""The table of read-outs of photographs, from known counts."""

from __future__ import annotations

from typing import Any

import pytest

from experiments.report.formatting import NONE
from experiments.report.tables.photo_readout import photo_readout_tables


def test_photo_readout_tables_compare_places_with_the_read_out(probed: dict[str, Any]) -> None:
    examples = probed["data"]["examples"]
    kinds = ["place" if index < 4 else "count" for index in range(examples)]
    outcomes = {"image": ("1100" + "1" * examples)[:examples]}
    part = {"grids": [{"grid_size": 2, "photographs": 8, "correct": "11101100", "control": "10000000"}]}
    record = probed | {"data": probed["data"] | {"kinds": kinds}, "accuracy": outcomes, "photo_readout": part}
    (table,) = photo_readout_tables([probed, record])
    row = table.data.iloc[0]
    assert (row["readout"], row["control"], row["answers"], row["questions"]) == (5 / 8, 1 / 8, 0.5, 4)
    assert row["share"] == pytest.approx(0.8)
    assert (row["readout_low"], row["readout_high"]) == (0.5, 0.75)  # resampled over the two images
    assert table.text["Share of the read-out (%)"].tolist() == ["80"]


def test_photo_readout_tables_of_two_grid_sizes_compare_nothing(probed: dict[str, Any]) -> None:
    grids = [
        {"grid_size": size, "photographs": size**2, "correct": "1" * size**2, "control": "0" * size**2}
        for size in (2, 3)
    ]
    (table,) = photo_readout_tables([probed | {"photo_readout": {"grids": grids}}])
    assert table.data["readout"].tolist() == [1.0, 1.0]
    assert table.text["Model's answers (%)"].tolist() == [NONE, NONE]


def test_photo_readout_tables_without_such_a_record_are_none(probed: dict[str, Any]) -> None:
    assert photo_readout_tables([probed]) == ()
