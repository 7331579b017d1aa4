"""Reading layer: the layer at which text reads a property of the image, from swaps of minimal pairs.

docs/fusion_depth.md has the formula, and what the layer can and cannot show.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from math import factorial

import numpy as np
from jaxtyping import Int

from probes.fusion.bootstrap import require_bootstrap, resampled_means
from probes.fusion.depth import READING_SHARE, ROUNDING_SLACK
from probes.interventions.swapping import Swaps

# Fewer pairs give no interval worth reporting.
MIN_PAIRS = 10
# Level of the test that answers follow the property.
SIGNIFICANCE = 0.05
# Orders of the answers that the test tries: all of them if there are no more.
MAX_ORDERS = 2000


@dataclass(frozen=True)
class ReadingLayer:
    """A reading layer with its bootstrap interval, as plain Python values (`dataclasses.asdict` is ready for JSON).

    Attributes:
        layer: Layer, counted from 1, by which text has read half of the property. 0 if it has before the first layer, as
            in LLaVA-Mini's pre-fusion. None if the model does not answer by the property, or has fewer than 10 pairs
            right; then `low` and `high` are None too.
        low, high: Percentile interval of the layer over resampled pairs, both ends included.
        layers: Layers of the model.
        pairs: Pairs that were measured.
        right: Pairs of which the model answers both images right. The estimate uses these.
        chance: Share of all assignments of the answers to the property under which at least as many pairs are right.
        level: Confidence level of the intervals.
        moved: Share of the move between the two answers that is left with the other image from layer 0, 1, ... on;
            empty without a layer, as the fields below.
        moved_low, moved_high: Interval of `moved` at each point.
        flipped: Share of runs whose most likely token is the answer to the other image, at each point.
        reads: Layers, counted from 1, whose own share of the move is above 10% at the lower end of its interval.
    """

    layer: int | None
    low: int | None
    high: int | None
    layers: int
    pairs: int
    right: int
    chance: float
    level: float = 0.95
    moved: tuple[float, ...] = ()
    moved_low: tuple[float, ...] = ()
    moved_high: tuple[float, ...] = ()
    flipped: tuple[float, ...] = ()
    reads: tuple[int, ...] = ()

    def __str__(self) -> str:
        counts = f"{self.right} of {self.pairs} pairs right"
        if self.layer is None:
            return f"none of {self.layers} layers ({counts}, swaps)"
        return f"layer {self.layer} of {self.layers} ({self.level:.0%} CI {self.low} to {self.high}, {counts}, swaps)"


def reading_layer(swaps: Swaps, *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> ReadingLayer:
    """Estimate the layer at which text reads the property that differs in minimal pairs.

    Let d(k) be log p(answer to B) - log p(answer to A) of a run on image A whose visual states are B's from layer k on,
    d_A and d_B those of the intact runs on A and on B, and n the number of layers. The move at k is

        s(k) = mean of (d(k) - d_A) / mean of (d_B - d_A)

    over the pairs of which the model answers both images right, and over both directions (with A and B exchanged).
    s(n) = 0. s(0) = 1, unless text takes in the image before the first layer. The reading layer is the smallest k with
    s(j) < 1/2 for all j >= k. So the layers from k + 1 on carry less than half of the answer's move.

    The interval is a percentile bootstrap over pairs; both directions and all points of a pair stay together.

    The layer is None unless the model answers by the property. Under the null hypothesis its most likely tokens have
    nothing to do with the words' meaning, so any assignment of the answers to the values of the property gets equally
    many pairs right. `chance` is the share of all assignments (of 2,000 random ones, if there are more) that get at least
    as many right as the true one. It must be at most 0.05, which needs four different answers: yes and no are too few.

    Args:
        swaps: Answers to minimal pairs that differ in one property.
        level: Confidence level.
        resamples: Number of bootstrap resamples.
        seed: Seed of the bootstrap and of random assignments.

    Returns:
        The layer with its interval.

    Raises:
        ValueError: The level is not between 0 and 1, or there is no resample.

    Example:
        >>> from probes import planted, swap_images
        >>> model = planted(layer=(2, 4), layers=5)  # reads red in layer 2 and blue in layer 4
        >>> for changed in ("red", "blue"):
        ...     print(reading_layer(swap_images(*model.pairs(12, changed).arguments)))
        layer 2 of 5 (95% CI 2 to 2, 12 of 12 pairs right, swaps)
        layer 4 of 5 (95% CI 4 to 4, 12 of 12 pairs right, swaps)
    """
    require_bootstrap(level, resamples)
    layers, right = len(swaps.difference) - 1, int(swaps.right.sum())
    chance = share_of_assignments(swaps, seed)
    if right < MIN_PAIRS or chance > SIGNIFICANCE:
        return ReadingLayer(None, None, None, layers, len(swaps.answers), right, chance, level)
    own = swaps.difference[:, swaps.right].astype(np.float64)
    # d_B is that of B's own run with the two answers exchanged.
    total = -own[-1].sum(axis=1)
    values = np.concatenate([(own - own[-1]).mean(axis=2), total[None]])
    # The first row is the estimate, the others are the resamples.
    means = np.concatenate([values.mean(axis=1)[None], resampled_means(values, resamples, seed)[0]])
    moved, tails = means[:, :-1] / means[:, -1:], ((1 - level) / 2, (1 + level) / 2)
    at_least_half = moved >= 0.5 - ROUNDING_SLACK
    # One past the last point with at least half.
    read_at = np.where(at_least_half.any(axis=1), layers + 1 - at_least_half[:, ::-1].argmax(axis=1), 0)
    low, high = np.quantile(read_at[1:], tails, method="inverted_cdf")
    moved_low, moved_high = np.quantile(moved[1:], tails, axis=0)
    lowest_own_shares = np.quantile(-np.diff(moved)[1:], tails[0], axis=0)
    return ReadingLayer(
        int(read_at[0]),
        int(low),
        int(high),
        layers,
        len(swaps.answers),
        right,
        chance,
        level,
        tuple(moved[0].tolist()),
        tuple(moved_low.tolist()),
        tuple(moved_high.tolist()),
        tuple(swaps.flipped[:, swaps.right].mean(axis=(1, 2)).tolist()),
        tuple((np.flatnonzero(lowest_own_shares > READING_SHARE) + 1).tolist()),
    )


def share_of_assignments(swaps: Swaps, seed: int = 0) -> float:
    """Return the share of assignments of the answers to the property that get at least as many pairs right.

    An assignment is a permutation of the different answers; the true one counts. If there are more than 2,000, the true
    one and 2,000 random ones are tried.

    Args:
        swaps: Answers to minimal pairs.
        seed: Seed of the random assignments.

    Example:
        >>> answers = np.array([[1, 2], [3, 4]])
        >>> swaps = Swaps(answers, np.zeros((2, 2, 2)), np.array([answers, answers]))  # all right
        >>> round(share_of_assignments(swaps) * 24)  # one of the 24 permutations: the true one
        1
    """
    words, own = np.unique(swaps.answers, return_inverse=True)
    own = own.reshape(swaps.answers.shape)
    predicted = swaps.predicted[-1]
    counts = [(words[order][own] == predicted).all(axis=1).sum() for order in _orders(len(words), seed)]
    return float(np.mean(np.array(counts) >= swaps.right.sum()))


def _orders(count: int, seed: int) -> Iterator[Int[np.ndarray, " count"]]:
    """Yield the identity first, then the other permutations of `count` items, or random ones."""
    if factorial(count) <= MAX_ORDERS:
        yield from map(np.array, permutations(range(count)))
        return
    generator = np.random.default_rng(seed)
    yield np.arange(count)
    for _ in range(MAX_ORDERS):
        yield generator.permutation(count)
