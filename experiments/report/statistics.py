"""Bootstrap intervals and paired tests over examples and seeds.

Intervals are percentile bootstraps (Efron 1979) with 2,000 seeded draws. The examples of a draw depend only on the number
of examples, so all intervals over equally many examples share their draws. Above `MAX_SHARED_SAMPLES` the draws would
take too much memory. Examples with equal outcomes are then drawn together. This is exact, because the bootstrap of a
mean depends only on the distinct values and their counts. Its cost does not grow with the number of examples.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Integer

BOOTSTRAP_DRAWS = 2000
CONFIDENCE_LEVEL = 0.95
MAX_SHARED_SAMPLES = 5000
"""Largest number of samples whose draws are cached (40 MB)."""
TAILS = ((1 - CONFIDENCE_LEVEL) / 2, (1 + CONFIDENCE_LEVEL) / 2)
"""Quantiles of the draws that bound an interval."""


class Interval(NamedTuple):
    """A mean with the bounds of its 95% interval, in the unit of the values."""

    mean: float
    low: float
    high: float


def mean_interval(
    values: Float[np.ndarray, "rows samples"],
) -> tuple[Float[np.ndarray, " rows"], Float[np.ndarray, " rows"], Float[np.ndarray, " rows"]]:
    """Return the mean of each row over its defined samples, with a 95% bootstrap interval over samples.

    All rows are resampled together.

    Args:
        values: One row for each quantity; NaN marks an undefined value.

    Returns:
        Mean, lower bound and upper bound of each row, each of shape [rows]. A row without a defined value gives NaN. The
        bounds are NaN too if a row has so few defined values that a draw may contain none of them.
    """
    defined = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        mean = np.where(defined, values, 0).sum(axis=1) / defined.sum(axis=1)
    low, high = np.quantile(_resampled_means(values), TAILS, axis=0)
    return mean, low, high


def accuracy_interval(outcomes: Integer[np.ndarray, "seeds examples"]) -> Interval:
    """Return the mean of 0/1 outcomes with a 95% interval over examples and seeds (crossed bootstrap).

    Examples and seeds are both resampled. With two or three seeds that differ much the interval is too narrow
    (docs/statistics.md has how often it covers). With one seed it covers only the choice of examples.

    Where all outcomes are equal, every draw is too. The far bound is then the exact one of Clopper and Pearson (1934) for
    that many examples.

    Args:
        outcomes: 0/1 outcomes, one row for each seed.

    Returns:
        Mean accuracy with its bounds, from 0 to 1.

    Example:
        >>> accuracy_interval(np.ones((1, 334), dtype=int)).low.__round__(3)
        0.989
    """
    mean, reach = float(outcomes.mean()), TAILS[0] ** (1 / outcomes.shape[1])
    if mean in (0.0, 1.0):
        return Interval(mean, reach, 1.0) if mean else Interval(mean, 0.0, 1 - reach)
    draws = _resample_seeds(_resampled_means(outcomes), np.random.default_rng(0))
    return Interval(mean, *_bounds(draws))


def difference_interval(
    outcomes: Integer[np.ndarray, "seeds examples"], baseline: Integer[np.ndarray, "others examples"]
) -> Interval:
    """Return the difference of two mean outcomes on the same examples, with a 95% interval.

    The interval is paired over examples: a draw takes the same examples for both models. It draws the seeds of the two
    models independently.

    Args:
        outcomes: 0/1 outcomes of the first model, one row for each seed.
        baseline: 0/1 outcomes of the second model on the same examples.

    Returns:
        Mean difference (first minus second) with its bounds, from -1 to 1.
    """
    return contrast_interval([(1, outcomes), (-1, baseline)])


def contrast_interval(terms: Sequence[tuple[int, Float[np.ndarray, "seeds examples"]]]) -> Interval:
    """Return a sum of signed means on the same examples, with a 95% interval (crossed bootstrap).

    A draw takes the same examples for all terms, and draws the seeds of each term independently.

    Args:
        terms: Sign (1 or -1) and values of each term; the numbers of seeds may differ.

    Returns:
        The sum with its bounds, in the unit of the values.

    Example:
        >>> right, wrong = np.ones((1, 4)), np.zeros((2, 4))
        >>> contrast_interval([(1, right), (-1, wrong)])
        Interval(mean=1.0, low=1.0, high=1.0)
    """
    rng = np.random.default_rng(0)
    means = _resampled_means(np.concatenate([values for _, values in terms]))
    ends = np.cumsum([len(values) for _, values in terms])
    parts = np.split(means, ends[:-1], axis=1)
    draws = np.sum([sign * _resample_seeds(part, rng) for (sign, _), part in zip(terms, parts, strict=True)], axis=0)
    mean = float(sum(sign * values.mean() for sign, values in terms))
    return Interval(mean, *_bounds(draws))


def crossed_draws(values: Float[np.ndarray, "quantities seeds examples"]) -> Float[np.ndarray, "quantities draws"]:
    """Return the mean of each quantity in every draw of examples and seeds, the same draws for all quantities.

    Args:
        values: The quantities, without NaN.

    Example:
        >>> crossed_draws(np.ones((2, 3, 50))).shape
        (2, 2000)
    """
    quantities, seeds, examples = values.shape
    means = _resampled_means(values.reshape(-1, examples)).reshape(-1, quantities, seeds)
    chosen = np.random.default_rng(0).integers(seeds, size=(len(means), 1, seeds))
    return np.take_along_axis(means, chosen, axis=2).mean(axis=2).T


def paired_test(
    outcomes: Integer[np.ndarray, "seeds examples"],
    baseline: Integer[np.ndarray, "others examples"],
    alternative: str = "two-sided",
) -> float:
    """Return the exact p-value of a paired randomisation test.

    The null hypothesis is that the sign of every example's difference is a coin toss. Outcomes are averaged over seeds
    first. The test is therefore about these trained models on other examples, not about other seeds. With one seed on
    either side it is McNemar's exact test (1947).

    With s and t seeds, an example's difference times s t is a whole number d. Under the null hypothesis, the sum of the
    positive parts is the sum over the values v of |d| of v Binomial(#{|d| = v}, 1/2). Its distribution is the
    convolution of these terms, so no random draws are needed.

    Args:
        outcomes: 0/1 outcomes of the first model, one row for each seed; or other whole numbers, such as scores in tenths.
        baseline: Those of the second model on the same examples.
        alternative: "two-sided", or "greater" (the first model has the higher accuracy).

    Returns:
        The p-value, from 0 to 1.
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
    """Return p-values adjusted by Holm's (1979) step-down correction, in the given order."""
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(p_values), 0, -1)
    stepped = np.minimum(1.0, np.maximum.accumulate(np.asarray(p_values, dtype=float)[order] * factors))
    adjusted = np.empty(len(p_values))
    adjusted[order] = stepped
    return [float(value) for value in adjusted]


def _resampled_means(values: np.ndarray) -> Float[np.ndarray, "draws rows"]:
    """Return the mean of each row in every bootstrap draw."""
    samples = values.shape[1]
    if samples <= MAX_SHARED_SAMPLES:
        weights = _shared_weights(samples)
    else:
        values, counts = np.unique(values, axis=1, return_counts=True)
        weights = _sample_generator(samples).multinomial(samples, counts / samples, size=BOOTSTRAP_DRAWS)
    defined = ~np.isnan(values)
    weights = weights.astype(np.float32, copy=False)
    totals = weights @ np.where(defined, values, 0).T.astype(np.float32)
    if defined.all():
        return totals / np.float32(samples)
    with np.errstate(invalid="ignore"):
        return totals / (weights @ defined.T.astype(np.float32))


@functools.lru_cache(maxsize=32)
def _shared_weights(samples: int) -> Float[np.ndarray, "draws samples"]:
    """Return how often each draw takes each sample."""
    taken = _sample_generator(samples).integers(samples, size=(BOOTSTRAP_DRAWS, samples), dtype=np.int32)
    taken += samples * np.arange(BOOTSTRAP_DRAWS, dtype=np.int32)[:, None]
    return np.bincount(taken.ravel(), minlength=taken.size).reshape(taken.shape).astype(np.float32)


def _sample_generator(samples: int) -> np.random.Generator:
    """Return the generator that draws samples.

    It differs from the one that draws seeds, whose numbers would otherwise repeat these.
    """
    return np.random.default_rng((1, samples))


def _bounds(draws: Float[np.ndarray, " draws"]) -> tuple[float, float]:
    """Return the quantiles that bound an interval, without the rounding errors of draws in float32.

    Otherwise an interval that ends at zero may seem to exclude it.
    """
    low, high = np.quantile(draws, TAILS).round(6)
    return float(low), float(high)


def _resample_seeds(means: Float[np.ndarray, "draws seeds"], rng: np.random.Generator) -> Float[np.ndarray, " draws"]:
    """Return each draw's mean over as many randomly drawn seeds as there are."""
    chosen = rng.integers(means.shape[1], size=means.shape)
    return np.take_along_axis(means, chosen, axis=1).mean(axis=1)


def _fair_binomial(count: int) -> Float[np.ndarray, " outcomes"]:
    """Return the probabilities of 0, 1, ... `count` heads in `count` tosses of a fair coin."""
    factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, count + 1)))])
    return np.exp(factorials[count] - factorials - factorials[::-1] - count * np.log(2))
