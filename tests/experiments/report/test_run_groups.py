from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from experiments.records.files import Records
from experiments.records.views import outcomes
from experiments.report.run_groups import Cell, ablation_cells, group_cells
from experiments.report.statistics import paired_test


def cells_of(records: list[dict[str, Any]]) -> tuple[Cell, ...]:
    finished = tuple(record for record in records if record["status"] == "finished")
    failed = tuple(record for record in records if record["status"] == "failed")
    return ablation_cells(group_cells(Records(finished, failed, (), ())))


def test_seeds_are_taken_together_and_the_baseline_comes_first(records: list[dict[str, Any]]) -> None:
    cells = cells_of(records)
    assert len(cells) == 7
    assert cells[0].is_baseline
    assert cells[0].comparison == "baseline"
    assert [len(cell.finished) for cell in cells] == [2, 2, 1, 2, 2, 2, 2]
    text = records[0]["accuracy"]["image"] + records[1]["accuracy"]["image"]
    assert cells[0].accuracy is not None
    assert cells[0].accuracy.mean == pytest.approx(text.count("1") / len(text))


def test_p_values_are_corrected_for_the_rows_compared(records: list[dict[str, Any]]) -> None:
    cells = cells_of(records)
    baseline = cells[0].outcomes()
    raw = [paired_test(cell.outcomes(), baseline) for cell in cells[1:]]
    corrected = [cell.p_value for cell in cells[1:]]
    assert min(corrected) == pytest.approx(6 * min(raw))
    assert max(corrected) < 1
    difference = cells[1].difference
    assert difference is not None
    assert difference.mean == pytest.approx(np.mean(cells[1].outcomes()) - np.mean(baseline))


def test_a_failed_cell_stays_beside_its_family(records: list[dict[str, Any]]) -> None:
    lost = copy.deepcopy(next(record for record in records if record["status"] == "failed"))
    lost["config"]["compressor"]["size"] = 3
    cells = cells_of([*records, lost])
    cell = next(cell for cell in cells if not cell.finished)
    assert (cell.label, cell.compressor, cell.visual_tokens, cell.prefusion_layers) == ("LLaVA-Mini", "average", 9, 2)
    assert cells.index(cell) == 3
    assert cell.comparison == "failed"
    assert cell.failures == "failed: RuntimeError: out of memory at step 12_000"
    half = next(cell for cell in cells if cell.finished and cell.failed)
    assert half.failures.startswith("1 of 2 seeds failed")


def test_other_settings_split_cells_and_are_named(records: list[dict[str, Any]]) -> None:
    longer = copy.deepcopy(records[4])
    longer["config"]["train"]["steps"] = 400
    cell = next(cell for cell in cells_of([*records, longer]) if cell.settings == "train.steps=400")
    assert cell.comparison == "no baseline"
    assert cell.difference is None


def test_other_data_are_not_compared(records: list[dict[str, Any]]) -> None:
    other = copy.deepcopy(records[4])
    other["data"]["fingerprint"] = "other"
    cell = next(cell for cell in cells_of([*records[:4], other]) if cell.finished[0] is other)
    assert cell.comparison == "no baseline"


def test_unused_settings_do_not_make_a_difference(records: list[dict[str, Any]]) -> None:
    for record in records[:2]:
        record["config"]["prefusion"]["init"] = "fresh"
    assert {cell.settings for cell in cells_of(records)} == {""}


def test_a_control_needs_every_seed(records: list[dict[str, Any]]) -> None:
    blank = cells_of(records)[0].outcomes("blank")
    assert blank is not None
    np.testing.assert_array_equal(blank[0], outcomes(records[0]["accuracy"]["blank"]))
    del records[1]["accuracy"]["blank"]
    assert cells_of(records)[0].outcomes("blank") is None
