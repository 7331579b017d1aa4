"""Tests of bootstrap intervals and paired tests against independent computations."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from experiments.report import statistics
from experiments.report.statistics import accuracy_interval, difference_interval, holm, mean_interval, paired_test


def bits(rng: np.random.Generator, *shape: int, rate: float = 0.5) -> np.ndarray:
    return (rng.random(shape) < rate).astype(np.uint8)


def test_mean_interval_many_samples_matches_normal_interval() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal([[3.0], [-1.0]], [[2.0], [0.5]], size=(2, 500))
    mean, low, high = mean_interval(values)
    error = values.std(axis=1) / np.sqrt(500)
    np.testing.assert_allclose(mean, values.mean(axis=1))
    np.testing.assert_allclose((low, high), (mean - 1.96 * error, mean + 1.96 * error), atol=0.15 * error.max())


def test_mean_interval_undefined_values_are_ignored() -> None:
    values = np.array([[1.0, np.nan, 3.0] * 20, [np.nan] * 60])
    mean, low, high = mean_interval(values)
    assert mean[0] == 2.0
    assert 1.0 < low[0] < 2.0 < high[0] < 3.0
    assert np.isnan([mean[1], low[1], high[1]]).all()


def test_accuracy_interval_one_seed_has_binomial_quantiles() -> None:
    outcomes = np.repeat([1, 0], [300, 100]).astype(np.uint8)[None]
    interval = accuracy_interval(outcomes)
    assert interval.mean == 0.75
    expected = stats.binom(400, 0.75).ppf([0.025, 0.975]) / 400
    np.testing.assert_allclose(interval[1:], expected, atol=0.005)


def test_accuracy_interval_differing_seeds_widen_it() -> None:
    rng = np.random.default_rng(1)
    alike = np.repeat(bits(rng, 1, 400, rate=0.6), 3, axis=0)
    apart = np.stack([bits(rng, 400, rate=rate) for rate in (0.3, 0.6, 0.9)])
    width = [high - low for _, low, high in (accuracy_interval(alike), accuracy_interval(apart))]
    assert width[1] > 2 * width[0]


@pytest.mark.parametrize("right", [0, 1])
def test_accuracy_interval_of_equal_outcomes_is_the_exact_one(right: int) -> None:
    expected = stats.binomtest(40 * right, 40).proportion_ci(method="exact")
    mean, low, high = accuracy_interval(np.full((2, 40), right))
    assert (mean, low, high) == pytest.approx((right, expected.low, expected.high))


def test_interval_that_ends_at_zero_does_not_exclude_it() -> None:
    rng = np.random.default_rng(0)
    pairs = [(bits(rng, 3, 12, rate=0.6), bits(rng, 2, 12, rate=0.45)) for _ in range(300)]
    low = np.array([difference_interval(*pair).low for pair in pairs])
    assert ((np.abs(low) < 1e-7) == (low == 0)).all()
    assert (low == 0).any()


def test_difference_interval_equal_outcomes_give_zero() -> None:
    outcomes = bits(np.random.default_rng(2), 1, 50)
    assert difference_interval(outcomes, outcomes) == (0.0, 0.0, 0.0)


def test_difference_interval_paired_examples_narrow_it() -> None:
    rng = np.random.default_rng(3)
    baseline = bits(rng, 1, 500)
    better = np.maximum(baseline, bits(rng, 1, 500, rate=0.1))
    paired = difference_interval(better, baseline)
    unpaired = difference_interval(better, rng.permuted(baseline, axis=1))
    assert paired.low > 0
    assert paired.high - paired.low < 0.5 * (unpaired.high - unpaired.low)


def test_intervals_above_the_cache_limit_stay_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    first, second = bits(rng, 3, 400, rate=0.6), bits(rng, 2, 400, rate=0.5)
    values = rng.normal(size=(2, 400))
    values[1, ::3] = np.nan
    cached = accuracy_interval(first), difference_interval(first, second), *np.transpose(mean_interval(values))
    monkeypatch.setattr(statistics, "MAX_SHARED_SAMPLES", 399)
    again = accuracy_interval(first), difference_interval(first, second), *np.transpose(mean_interval(values))
    for (mean, low, high), (other, *bounds) in zip(cached, again, strict=True):
        assert mean == other
        np.testing.assert_allclose((low, high), bounds, atol=0.1 * (high - low))  # 2,000 draws each


def test_mean_interval_draw_has_as_many_examples_as_the_sample() -> None:
    values = np.stack([np.ones(50), np.arange(50.0)])
    mean, low, high = mean_interval(values)
    assert mean[0] == low[0] == high[0] == 1
    assert high[1] - low[1] == pytest.approx(2 * 1.96 * np.std(np.arange(50)) / np.sqrt(50), rel=0.08)


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 20))
def test_paired_test_one_seed_matches_mcnemar(gained: int, lost: int, same: int) -> None:
    first = np.repeat([1, 0, 1], [gained, lost, same]).astype(np.uint8)[None]
    second = np.repeat([0, 1, 1], [gained, lost, same]).astype(np.uint8)[None]
    flips = gained + lost
    for alternative in ("two-sided", "greater"):
        expected = stats.binomtest(gained, flips, alternative=alternative).pvalue if flips else 1.0
        assert paired_test(first, second, alternative) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 3))
def test_paired_test_several_seeds_matches_full_enumeration_of_signs(seed: int, seeds: int, others: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = bits(rng, seeds, 9, rate=0.7), bits(rng, others, 9, rate=0.4)
    # Whole numbers: with thirds, rounding would break ties between sums.
    differences = first.sum(0, dtype=float) * others - second.sum(0, dtype=float) * seeds
    exact = stats.permutation_test(
        (differences,), np.sum, permutation_type="samples", n_resamples=np.inf, alternative="greater"
    )
    assert paired_test(first, second, "greater") == pytest.approx(exact.pvalue, abs=1e-9)


def test_paired_test_many_examples_stays_exact() -> None:
    first, second = np.ones((2, 20_000), np.uint8), np.zeros((3, 20_000), np.uint8)
    first[:, 10_100:], second[:, 10_100:] = 0, 1
    assert paired_test(first, second) == pytest.approx(stats.binomtest(10_100, 20_000).pvalue, rel=1e-6)


def test_holm_worked_example_matches() -> None:
    # Four p-values, computed by hand: 0.005 x 4, then 0.01 x 3, then 0.03 x 2, then max(0.06, 0.04).
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []
