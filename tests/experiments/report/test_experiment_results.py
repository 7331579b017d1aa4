from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.config import rows
from experiments.records.files import Records
from experiments.report.experiment_results import Study, study_of
from experiments.report.experiment_specs import Definition, definitions
from experiments.report.run_groups import group_cells
from experiments.report.statistics import paired_test

Made = list[dict[str, Any]]
TABLE6 = next(found for found in definitions() if found.name == "table6_prefusion")


def read(definition: Definition, records: Made, asked: bool = False) -> Study | None:
    parts = (tuple(r for r in records if r["status"] == status) for status in ("finished", "failed"))
    return study_of(definition, group_cells(Records(*parts, (), ())), asked)


def whole(definition: Definition, records: Made) -> Study:
    found = read(definition, records)
    assert found is not None
    return found


def answer(record: dict[str, Any], right: str) -> dict[str, Any]:
    changed = copy.deepcopy(record)
    changed["accuracy"] = {"image": right}
    changed["data"] |= {"examples": len(right), "kinds": ["place"] * len(right), "guess": None}
    return changed


def test_records_meet_their_rows(definition: Definition, table_records: Made) -> None:
    study = whole(definition, table_records)
    assert [row.label for row in study.rows] == [
        "LLaVA",
        "1 token / 4 tokens",
        "16 tokens",
        "64 tokens",
        "2 layers",
        "2 layers, 50% | average",
    ]
    assert [row.state for row in study.rows] == ["finished"] * 3 + ["not run", "finished", "failed"]
    assert [row.absent for row in study.rows] == [(), (), (), (0, 1, 2), (2,), ()]
    for row, (compressor, size, layers) in zip(
        study.finished, (("none", 6, 0), ("query", 1, 0), ("query", 2, 0), ("query", 1, 2)), strict=True
    ):
        assert row.cell is not None
        for record in row.cell.records:
            config = record["config"]
            found = config["compressor"]["name"], config["compressor"]["size"], config["prefusion"]["layers"]
            assert found == (compressor, size, layers)
    wanted = [r["accuracy"]["image"] for r in table_records[3:6]]
    assert ["".join(map(str, seed)) for seed in study.rows[1].outcomes] == wanted


@settings(max_examples=30)
@given(st.integers(2, 48))
def test_every_cell_of_a_table_has_one_row_whatever_the_grid(grid: int) -> None:
    sizes = {1: 1} | {c: round(math.exp(math.log(grid) * math.log(c) / math.log(24))) for c in (4, 8, 12)}
    wanted = {
        ("none", 1, 0),
        *(("query", size, 0) for size in sizes.values()),
        *(("query", 1, n) for n in (1, 2, 3, 4)),
    }
    found = TABLE6.settings({"model.grid": grid, "seed": 0})
    assert {tuple(row.values.values()) for row in found} == wanted
    assert len(found) == len(wanted)
    assert sum(len(row.paper) for row in found) == len(TABLE6.rows) == 9


def test_other_settings_are_another_family(definition: Definition, table_records: Made) -> None:
    longer = [copy.deepcopy(record) for record in table_records[:6]]
    for record in longer:
        record["config"]["train"]["steps"] = 400
        record["id"] = "f" + record["id"][1:]
        record["provenance"]["started"] = "2026-12-01T10:00:00"
    study = whole(definition, [*table_records, *longer])
    assert study.left_out == ("train.steps=400",)
    assert {record["config"]["train"]["steps"] for record in study.records} == {200}
    # of as many finished cells the newest
    study = whole(definition, [*table_records[:6], *longer])
    assert {record["config"]["train"]["steps"] for record in study.records} == {400}
    assert study.left_out == ("train.steps=200",)


def test_other_data_are_another_family(definition: Definition, table_records: Made) -> None:
    for record in table_records[6:9]:
        record["data"]["fingerprint"] = "other"
    study = whole(definition, table_records)
    assert [row.state for row in study.rows[:3]] == ["finished", "finished", "not run"]
    assert study.left_out == ("the same settings on other data",)


def test_rows_about_the_data_may_differ_in_them(definition: Definition, table_records: Made) -> None:
    about = Definition(
        "frames",
        "Frames?",
        tuple(rows.Row(str(count), {"data.frames": count}) for count in (8, 0)),
    )
    made = []
    for index, record in enumerate((table_records[0], table_records[1], copy.deepcopy(table_records[0]))):
        record["config"]["data"]["frames"] = 8 if index < 2 else 0
        record["experiment"], record["data"]["fingerprint"] = "frames", f"frames {index // 2}"
        record["id"] = f"{index:016x}"
        made.append(record)
    study = whole(about, made)
    assert [row.state for row in study.rows] == ["finished", "finished"]
    assert study.comparable(*study.rows)


def test_a_table_is_made_where_it_was_run_or_is_whole(definition: Definition, table_records: Made) -> None:
    for record in table_records:
        record["experiment"] = record["config"]["name"] = "table61_other"
    assert read(definition, table_records) is None
    assert read(definition, table_records, asked=True) is not None
    table_records[0]["experiment"] = "table60_mixed"
    assert read(definition, table_records) is not None
    short = Definition(definition.name, definition.title, definition.rows[1:4])
    assert read(short, table_records[3:]) is not None  # both of its rows are finished
    assert read(short, []) is None


def test_a_configuration_without_a_grid_has_no_scaled_rows(definition: Definition, table_records: Made) -> None:
    for record in table_records:
        del record["config"]["model"]["grid"]
    assert read(definition, table_records, asked=True) is None


def test_differences_are_the_same_in_every_table(definition: Definition, table_records: Made) -> None:
    study = whole(definition, table_records)
    turned = whole(Definition(definition.name, "", definition.rows[::-1]), table_records)
    first, second = study.rows[0], study.rows[2]
    mean, low, high = study.difference(first, second)
    assert mean == pytest.approx(first.outcomes.mean() - second.outcomes.mean())
    assert low < mean < high
    assert study.difference(second, first) == (-mean, -high, -low)
    again = {row.label: row for row in turned.rows}
    assert turned.difference(again["LLaVA"], again["16 tokens"]) == (mean, low, high)


def test_p_values_are_corrected_for_the_pairs_compared(definition: Definition, table_records: Made) -> None:
    study = whole(definition, table_records)
    pairs = [(row, study.rows[0]) for row in study.rows[1:]]
    found = study.p_corrected(pairs)
    raw = sorted(paired_test(row.outcomes, study.rows[0].outcomes) for row in study.finished[1:])
    stepped = [min(1.0, max(p * (3 - i) for i, p in enumerate(raw[: n + 1]))) for n in range(3)]
    assert sorted(p for p in found if p is not None) == pytest.approx(stepped)
    assert [p is None for p in found] == [False, False, True, False, True]


def planted(table_records: Made, *rates: tuple[int, ...]) -> Made:
    """Rows of 100 questions with one seed for each count of right answers, which lie at the front."""
    made = []
    for number, counts in enumerate(rates):
        for seed, count in enumerate(counts):
            record = answer(table_records[3 * number + seed], "1" * count + "0" * (100 - count))
            made.append(record)
    return made


def test_best_needs_to_beat_every_other_row(definition: Definition, table_records: Made) -> None:
    study = whole(definition, planted(table_records, (60,), (80,), (40,)))
    assert study.best is study.rows[1]
    assert whole(definition, planted(table_records, (60,), (80,), (77,))).best is None  # McNemar's p is 0.25
    assert whole(definition, planted(table_records, (60,), (80,), (80,))).best is None
    assert whole(definition, planted(table_records, (60,))).best is None


def test_seeds_that_disagree_take_the_best_away(definition: Definition, table_records: Made) -> None:
    apart = whole(definition, planted(table_records, (50, 50, 50), (44, 57, 70)))
    first, second = apart.rows[1], apart.rows[0]
    assert apart.p_value(first, second) < 0.01  # of these models on other questions
    assert apart.difference(first, second).low < 0  # of other seeds it cannot be said
    assert apart.best is None


def test_other_numbers_of_questions_are_not_compared(definition: Definition, table_records: Made) -> None:
    made = planted(table_records, (60,), (80,))
    made[1] = answer(made[1], "1" * 50)
    for record in made:
        record["data"]["fingerprint"] = "the same"
    study = whole(definition, made)
    assert not study.comparable(*study.rows[:2])
    assert study.p_corrected([(study.rows[1], study.rows[0])]) == [None]
    assert study.best is None


def test_the_bootstrap_is_that_of_a_loop(definition: Definition, table_records: Made) -> None:
    study = whole(definition, table_records)
    first, second = (row.outcomes for row in study.rows[:2])
    rng = np.random.default_rng(3)
    draws = []
    for _ in range(4000):
        some = rng.integers(120, size=120)  # the same questions for both
        ours, theirs = (matrix[rng.integers(3, size=3)][:, some].mean() for matrix in (first, second))
        draws.append(ours - theirs)
    found = study.difference(*study.rows[:2])
    np.testing.assert_allclose(found[1:], np.quantile(draws, (0.025, 0.975)), atol=0.012)


def test_what_a_budget_chose_sets_no_cells_apart(table_records: Made) -> None:
    definition = Definition(
        "equal", "Equal FLOPs.", tuple(rows.Row(name, {"budget.method": name}) for name in ("none", "query", "fastv"))
    )
    chosen = {"none": ("none", 1, []), "query": ("query", 3, []), "fastv": ("none", 1, [2])}
    made = []
    for method, (compressor, size, layers) in chosen.items():
        record = copy.deepcopy(table_records[0])
        record["id"], record["experiment"] = f"{len(made):016x}", "equal"
        record["config"] |= {
            "budget": {"method": method, "share": 0.6},
            "compressor": {"name": compressor, "size": size},
            "reduction": {"name": "none", "layers": layers},
        }
        made.append(record)
    assert [row.state for row in whole(definition, made).rows] == ["finished"] * 3
    assert not whole(definition, made).left_out
