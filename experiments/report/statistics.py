"""Intervals and tests over examples and seeds.

Intervals are percentile bootstraps (Efron 1979) with 2,000 seeded draws. Which examples a draw takes depends on their
number alone, so that all intervals over as many examples share their draws. Where they are too many to keep these,
examples with equal outcomes are drawn together: the bootstrap of a mean depends on the distinct values and their counts
alone, so this is exact, and its cost does not grow with the number of examples.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Integer

DRAWS = 2000
LEVEL = 0.95
SHARED = 5000
"""Most examples whose draws are kept (40 MB)."""
_TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)


class Interval(NamedTuple):
    """A mean with the bounds of its 95% interval, in the unit of the values."""

    mean: float
    low: float
    high: float


def mean_interval(
    values: Float[np.ndarray, "rows samples"],
) -> tuple[Float[np.ndarray, " rows"], Float[np.ndarray, " rows"], Float[np.ndarray, " rows"]]:
    """Mean of each row over its defined samples with a 95% bootstrap interval over samples.

    All rows are resampled together. NaN marks an undefined value; a row without any defined value gives NaN, and a row
    with so few that a draw may hold none gets NaN bounds.
    """
    defined = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        mean = np.where(defined, values, 0).sum(axis=1) / defined.sum(axis=1)
    low, high = np.quantile(_resampled_means(values), _TAILS, axis=0)
    return mean, low, high


def accuracy_interval(outcomes: Integer[np.ndarray, "seeds examples"]) -> Interval:
    """Mean of 0/1 outcomes with a 95% interval over examples and seeds, both resampled (crossed bootstrap).

    Resampling a handful of seeds understates how much seeds differ (by a factor sqrt((s - 1) / s) in the standard
    error); with one seed the interval covers the choice of examples only.
    """
    draws = _resample_seeds(_resampled_means(outcomes), np.random.default_rng(0))
    return Interval(float(outcomes.mean()), *map(float, np.quantile(draws, _TAILS)))


def difference_interval(
    outcomes: Integer[np.ndarray, "seeds examples"], baseline: Integer[np.ndarray, "others examples"]
) -> Interval:
    """Difference of two mean outcomes on the same examples with a 95% interval (paired over examples).

    A draw takes the same examples for both, and seeds of either independently.
    """
    rng = np.random.default_rng(0)
    means = _resampled_means(np.concatenate([outcomes, baseline]))
    draws = _resample_seeds(means[:, : len(outcomes)], rng) - _resample_seeds(means[:, len(outcomes) :], rng)
    return Interval(float(outcomes.mean() - baseline.mean()), *map(float, np.quantile(draws, _TAILS)))


def paired_test(
    outcomes: Integer[np.ndarray, "seeds examples"],
    baseline: Integer[np.ndarray, "others examples"],
    alternative: str = "two-sided",
) -> float:
    """Exact p-value of a paired randomisation test: could the sign of every example's difference be a coin toss?

    Outcomes are averaged over seeds first, so the test speaks of these trained models on other examples, not of other
    seeds. With one seed on either side it is McNemar's exact test (1947). `alternative` is "two-sided" or "greater"
    (the first has the higher accuracy).

    With seeds s and t, an example's difference times s t is a whole number d. Under the null hypothesis the sum of the
    positive parts is the sum over the values v of |d| of v Binomial(#{|d| = v}, 1/2), whose distribution is the
    convolution of these: no draws are needed.
    """
    differences = outcomes.sum(0, dtype=np.int64) * len(baseline) - baseline.sum(0, dtype=np.int64) * len(outcomes)
    differences = differences[differences != 0]
    differences //= np.gcd.reduce(differences)  # with s = t all are multiples of s: the same test on fewer sums
    distribution = np.ones(1)
    for value, count in zip(*np.unique(np.abs(differences), return_counts=True), strict=True):
        spread = np.zeros(value * count + 1)
        spread[::value] = _fair_binomial(int(count))
        distribution = np.convolve(distribution, spread)
    positive = int(differences[differences > 0].sum())
    upper = distribution[positive:].sum()
    if alternative == "greater":
        return float(min(1.0, upper))
    return float(min(1.0, 2 * min(upper, distribution[: positive + 1].sum())))


def holm(p_values: list[float]) -> list[float]:
    """Holm's (1979) step-down correction: adjusted p-values in the order given."""
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(p_values), 0, -1)
    stepped = np.minimum(1.0, np.maximum.accumulate(np.asarray(p_values, dtype=float)[order] * factors))
    adjusted = np.empty(len(p_values))
    adjusted[order] = stepped
    return [float(value) for value in adjusted]


def _resampled_means(values: np.ndarray) -> Float[np.ndarray, "draws rows"]:
    samples = values.shape[1]
    if samples <= SHARED:
        weights = _shared_weights(samples)
    else:
        values, counts = np.unique(values, axis=1, return_counts=True)
        weights = _generator(samples).multinomial(samples, counts / samples, size=DRAWS)
    defined = ~np.isnan(values)
    weights = weights.astype(np.float32, copy=False)
    totals = weights @ np.where(defined, values, 0).T.astype(np.float32)
    if defined.all():
        return totals / np.float32(samples)
    with np.errstate(invalid="ignore"):
        return totals / (weights @ defined.T.astype(np.float32))


@functools.lru_cache(maxsize=32)
def _shared_weights(samples: int) -> Float[np.ndarray, "draws samples"]:
    """How often each draw takes each sample."""
    taken = _generator(samples).integers(samples, size=(DRAWS, samples), dtype=np.int32)
    taken += samples * np.arange(DRAWS, dtype=np.int32)[:, None]
    return np.bincount(taken.ravel(), minlength=taken.size).reshape(taken.shape).astype(np.float32)


def _generator(samples: int) -> np.random.Generator:
    """Not that which draws seeds: its numbers would repeat these."""
    return np.random.default_rng((1, samples))


def _resample_seeds(means: Float[np.ndarray, "draws seeds"], rng: np.random.Generator) -> Float[np.ndarray, " draws"]:
    chosen = rng.integers(means.shape[1], size=means.shape)
    return np.take_along_axis(means, chosen, axis=1).mean(axis=1)


def _fair_binomial(count: int) -> Float[np.ndarray, " outcomes"]:
    factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, count + 1)))])
    return np.exp(factorials[count] - factorials - factorials[::-1] - count * np.log(2))
