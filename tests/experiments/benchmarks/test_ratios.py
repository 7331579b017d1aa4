"""Test the ratios of CPU time: their statistics, what counts as moved, the measurements, and the page."""

from __future__ import annotations

import json
import time

import pytest

from experiments.benchmarks.harness import cpu_seconds
from experiments.benchmarks.ratios import measurements
from experiments.benchmarks.ratios.__main__ import RECORD, main, measure_ratios
from experiments.benchmarks.ratios.comparison import Ratio, comparison_table, movement
from experiments.benchmarks.ratios.measurements import MEASUREMENTS, time_in_turns
from experiments.benchmarks.ratios.page import BEGIN, END, PAGE, replace_table


def spin(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_cpu_seconds_counts_work_and_no_waiting() -> None:
    assert cpu_seconds(lambda: time.sleep(0.3)) < 0.1
    assert cpu_seconds(lambda: spin(0.2)) >= 0.2


def test_ratio_is_the_median_of_rounds_with_the_distance_of_quartiles() -> None:
    """Ratios of single rounds: 0.5, 0.6, 0.7, 0.8, 9."""
    ratio = Ratio.of([0.5, 1.2, 2.1, 3.2, 45.0], [1.0, 2.0, 3.0, 4.0, 5.0])
    assert ratio == Ratio(0.7, 0.2, 5)
    assert Ratio.of([3.0], [2.0]) == Ratio(1.5, 0.0, 1)


@pytest.mark.parametrize(
    ("committed", "now", "expected"),
    [(0.50, 0.56, "slower"), (0.50, 0.54, ""), (0.50, 0.46, ""), (0.50, 0.44, "faster")],
)
def test_movement_needs_more_than_the_noise_of_both(committed: float, now: float, expected: str) -> None:
    assert movement(Ratio(committed, 0.02, 5), Ratio(now, 0.03, 5)) == expected


def test_comparison_table_lists_new_and_unmeasured_ratios() -> None:
    old = {("a", "x"): Ratio(0.5, 0.01, 5), ("a", "y"): Ratio(0.2, 0.01, 5)}
    lines = comparison_table(old, {("a", "x"): Ratio(0.9, 0.01, 5), ("b", "z"): Ratio(1.0, 0.0, 5)}).splitlines()
    assert lines[2:] == [
        "| a | x | 0.500 ± 0.010 | 0.900 ± 0.010 | slower |",
        "| a | y | 0.200 ± 0.010 |  | not measured |",
        "| b | z |  | 1.000 ± 0.000 | new |",
    ]


def test_time_in_turns_ratio_of_work_is_that_of_times() -> None:
    """One run spins three times as long as the other."""
    times = time_in_turns({"short": lambda: spin(0.02), "long": lambda: spin(0.06)}, "short", 3)
    assert list(times) == ["long"]
    assert Ratio.of(*times["long"]).ratio == pytest.approx(3, rel=0.2)


@pytest.mark.parametrize("name", [name for name in MEASUREMENTS if name != "start"])
def test_measurement_at_small_size_gives_times_of_each_round(name: str) -> None:
    for numerators, denominators in MEASUREMENTS[name].measure(2, True).values():
        assert len(numerators) == len(denominators) == 2
        assert min(*numerators, *denominators) > 0


def test_child_cpu_seconds_counts_the_child_alone() -> None:
    spinning = "import time\nwhile time.process_time() < 0.5: pass"
    assert 0.5 <= measurements._child_cpu_seconds(["-c", spinning]) < 1.5


def test_measure_ratios_in_a_process_of_its_own_states_machine_and_command() -> None:
    record = measure_ratios(["recording"], rounds=2, small=True)["recording"]
    assert set(record["ratios"]) == {"mass", "text", "all", "contribution"}
    assert all(values["ratio"] > 0 and values["rounds"] == 2 for values in record["ratios"].values())
    assert "1 thread" in record["machine"]
    assert record["command"].endswith(" recording")


def test_main_unknown_measurement_ends_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["speed"])
    assert "'speed'" in capsys.readouterr().err.splitlines()[-1]


def test_committed_ratios_are_those_of_the_page() -> None:
    record = json.loads(RECORD.read_text())
    assert set(record) <= set(MEASUREMENTS)
    page = PAGE.read_text(encoding="utf-8")
    assert page == replace_table(page, record)
    for measured in record.values():
        for name, values in measured["ratios"].items():
            assert f"| {name} | {values['ratio']:.3f} | {values['noise']:.3f} | {values['rounds']} |" in page


def test_replace_table_page_without_marks_raises() -> None:
    assert replace_table(f"a\n{BEGIN}\nold\n{END}\nb", {}) == f"a\n{BEGIN}\n\n\n\n{END}\nb"
    with pytest.raises(ValueError, match="mark"):
        replace_table("a page", {})
