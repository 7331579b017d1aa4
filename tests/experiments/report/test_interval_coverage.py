"""How often 95% intervals over questions and seeds cover the truth, as the page on statistics says.

`python -m tests.experiments.report.test_interval_coverage` prints the table of that page.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from experiments.report.experiment_results import ALPHA
from experiments.report.statistics import accuracy_interval, difference_interval, paired_test

ACCURACY = 0.7
SHARED = 0.6
"""Share of the variance of a question's latent difficulty that all trainings share, so that they mostly agree."""


def shares(seeds: int, deviation: float, questions: int, draws: int) -> tuple[float, float, float]:
    """Return shares of draws: accuracy covered, difference of equal rows covered, and equal rows called different.

    Args:
        seeds: Trainings of each row.
        deviation: Standard deviation of the accuracy between trainings.
        questions: Test questions.
        draws: Number of simulated tables.
    """
    rng = np.random.default_rng(0)
    accuracy, difference, different = np.zeros(draws), np.zeros(draws), np.zeros(draws)
    for draw in range(draws):
        right = ACCURACY + deviation * rng.standard_normal((2, seeds, 1))
        difficulty = np.sqrt(SHARED) * rng.standard_normal(questions)
        latent = difficulty + np.sqrt(1 - SHARED) * rng.standard_normal((2, seeds, questions))
        first, second = (latent < norm.ppf(right)).astype(int)
        _, low, high = accuracy_interval(first)
        accuracy[draw] = low <= ACCURACY <= high
        _, low, high = difference_interval(first, second)
        difference[draw] = low <= 0 <= high
        different[draw] = not difference[draw] and paired_test(first, second) < ALPHA
    return float(accuracy.mean()), float(difference.mean()), float(different.mean())


@pytest.mark.parametrize(("seeds", "deviation"), [(1, 0.0), (3, 0.0)])
def test_intervals_of_trainings_that_do_not_differ_cover_95_percent(seeds: int, deviation: float) -> None:
    accuracy, difference, different = shares(seeds, deviation, questions=500, draws=300)
    assert accuracy >= 0.92
    assert difference >= 0.92
    assert different <= 0.06


def test_intervals_of_two_trainings_that_differ_much_are_too_narrow() -> None:
    accuracy, difference, different = shares(2, 0.04, questions=500, draws=300)
    assert 0.65 < accuracy < 0.9
    assert 0.65 < difference < 0.9
    assert 0.05 < different < 0.35


if __name__ == "__main__":
    print("| Seeds | Deviation | Accuracy | Difference | Called different |\n|---|---|---|---|---|")
    for count in (1, 2, 3, 5):
        for points in (0, 1, 2, 4) if count > 1 else (0,):
            values = shares(count, points / 100, questions=2000, draws=1000)
            print(f"| {count} | {points} | " + " | ".join(f"{100 * value:.1f}" for value in values) + " |", flush=True)
