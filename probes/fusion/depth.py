"""Fusion depth: how many of a model's first layers text needs to take in the picture.

docs/fusion_depth.md has the formulas, and what each of the four curves can and cannot tell.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Int

Kind = Literal["attention", "removal", "knockout", "readout"]
# Slack when a share is compared with the threshold: sums that should be 0.9 may come out just below.
ROUNDING = 1e-9
# Bootstrap weights held at once (32 MiB in float64).
WEIGHTS_PER_CHUNK = 2**22
# Attention mass that counts as not looking. Attention is a convex combination: to take away sources of total mass m
# moves its output by at most m times the distance between what is taken and what stays.
FLOOR = 1e-3
# A layer is named as one that reads the picture when its own share of the whole is surely above this.
OWN_SHARE = 0.1


@dataclass(frozen=True)
class FusionDepth:
    """A fusion depth with its bootstrap interval, as plain Python values (`dataclasses.asdict` is ready for JSON).

    Attributes:
        depth: Number of first layers, or None where there is no fusion to locate; then `low` and `high` are None too.
        low, high: Percentile interval of the depth over resampled samples, both ends included.
        kind: "attention", "removal", "knockout" or "readout".
        threshold: Share that the depth has to reach.
        layers: Layers of the model.
        samples: Samples the estimate rests on.
        level: Confidence level of the interval.
        curve: Mean over the samples at each point of the values; empty without samples.
        reads: Layers, counted from 1, whose own share of the whole is above 10% at the lower end of its interval.
    """

    depth: int | None
    low: int | None
    high: int | None
    kind: Kind
    threshold: float
    layers: int
    samples: int
    level: float = 0.95
    curve: tuple[float, ...] = ()
    reads: tuple[int, ...] = ()

    def __str__(self) -> str:
        if self.depth is None:
            return f"none of {self.layers} layers (n={self.samples}, {self.kind})"
        interval = f"{self.level:.0%} CI {self.low} to {self.high}"
        said = f"{self.depth} of {self.layers} layers ({interval}, n={self.samples}, {self.kind})"
        if self.reads in ((), (self.depth,)):
            return said
        return f"{said}, read at layer{'s' * (len(self.reads) > 1)} {_listed(self.reads)}"


def fusion_depth(
    values: Float[np.ndarray, "points samples"],
    kind: Kind,
    *,
    width: int = 1,
    threshold: float = 0.9,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> FusionDepth:
    """Depth of one of four curves, as the functions of `probes.fusion.curves` give them.

    With m(i) the mean of `values[i]` over samples and n the number of layers, the share r(k) of the first k layers is

    - attention: r(k) = (m(0) + ... + m(k - 1)) / (m(0) + ... + m(n - 1)), where `values[l]` is each sample's attention
      mass from text to vision in layer l. Samples that are NaN in all layers, as no query of theirs sees a picture,
      are left out.
    - removal: r(k) = (m(k) - m(0)) / (m(n) - m(0)), where `values[k]` scores each sample with vision removed from layer
      k onward: k = 0 has never seen it, k = n misses nothing.
    - knockout: r(k) = sum of d(i) over the windows that begin within the first k layers / sum of all d(i), with
      d(i) = m(0) - m(1 + i). `values[0]` scores the intact model, `values[1 + i]` the model with text cut off from
      vision in the `width` layers that end at layer i; windows are clipped to the model, so there are n + width - 1.
    - readout: r(k) = (m(k) - m(0)) / (max of m - m(0)), where `values[k]` says whether the picture's content was read
      off each sample's text after k layers.

    The depth is the smallest k with r(j) >= threshold for all j >= k; of a readout, which may fade again, the smallest
    k with r(k) >= threshold. The interval is a percentile bootstrap over samples, all points of a sample together.

    There is nothing to locate, and the depth is None, where the bootstrap interval of the whole (the denominator)
    includes 0. Attention is never 0: its depth is None where the interval of the largest m does not lie above 0.001.
    The maximum of a readout is never negative: its whole is taken, for this decision alone, from the samples that a
    resample left out, at the maximum of those it drew. Resamples whose whole is 0 or of the opposite sign, at most the
    fraction outside the interval, have no depth and are left out.

    `reads` compares each layer's own share with 0.1: r(k) - r(k - 1), and for knockout that of min(a, b), where a is
    the least d of the windows around the layer and b the layer's damage if those of its window add up (least squares).

    Args:
        values: `[layers, samples]` for attention, `[layers + 1, samples]` for removal and readout,
            `[layers + width, samples]` for knockout.
        kind: How to read them.
        width: Layers in a knock-out window.
        threshold: Share to reach, above 0 and up to 1.
        level: Confidence level.
        resamples: Bootstrap resamples.
        seed: Of the bootstrap.

    Raises:
        ValueError: The shape, the kind or the threshold does not fit, there is one sample only, a score is NaN or
            infinite, a mass is negative, or a sample has a mass in some layers only.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind is {kind!r}: it must be one of {', '.join(map(repr, get_args(Kind)))}")
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}: it must be above 0 and at most 1")
    if width < 1 or (width > 1 and kind != "knockout"):
        raise ValueError(f"width is {width}: {'windows hold at least 1 layer' if width < 1 else f'{kind} has none'}")
    values = np.asarray(values, dtype=np.float64)
    extra = {"attention": 0, "removal": 1, "knockout": width, "readout": 1}[kind]
    if values.ndim != 2 or values.shape[0] <= extra or values.shape[1] < 1:
        raise ValueError(
            f"values have shape {list(values.shape)}: {kind} needs [layers{f' + {extra}' if extra else ''}, samples]"
        )
    layers = values.shape[0] - extra
    if kind == "attention":
        values = _seen(values)
    elif not np.isfinite(values).all():
        raise ValueError("values hold a score that is not finite: every sample needs one at every point")

    samples = values.shape[1]
    result = partial(FusionDepth, kind=kind, threshold=threshold, layers=layers, samples=samples, level=level)
    if samples == 0:
        return result(depth=None, low=None, high=None)
    if samples == 1:
        raise ValueError("values hold a single sample: a bootstrap interval needs at least 2")
    # The first row is the estimate, the others are the resamples.
    drawn, left_out = _resampled_means(values, resamples, seed)
    means = np.concatenate([values.mean(axis=1)[None], drawn])
    result = partial(result, curve=tuple(means[0].tolist()))
    tails = (1 - level) / 2, (1 + level) / 2

    parts, whole, own = _shares(means, kind, width)
    # Of the whole; where that cannot be negative, no evidence is 0.
    evidence = whole[1:]
    if kind == "attention":
        evidence = (drawn.max(axis=1) - FLOOR).clip(0)
    elif kind == "readout":
        peak = drawn.argmax(axis=1)[:, None]
        evidence = (np.take_along_axis(left_out, peak, axis=1)[:, 0] - left_out[:, 0]).clip(0)
    lowest, highest = np.nanquantile(evidence, tails)
    if lowest <= 0 <= highest:
        return result(depth=None, low=None, high=None)

    alike = np.sign(whole) == np.sign(whole[0])
    short = parts[alike] / whole[alike, None] < threshold - ROUNDING
    # One past the last point that falls short (the first point, r(0) = 0, always does), or the first that does not.
    depths = short.argmin(axis=1) if kind == "readout" else layers + 1 - short[:, ::-1].argmax(axis=1)
    low, high = np.quantile(depths[1:], tails, method="inverted_cdf")
    surely = np.quantile((own[alike] / whole[alike, None])[1:], tails[0], axis=0) > OWN_SHARE
    reads = tuple((np.flatnonzero(surely) + 1).tolist())
    return result(depth=int(depths[0]), low=int(low), high=int(high), reads=reads)


@dataclass(frozen=True)
class Agreement:
    """How far several estimates of one model's fusion depth agree.

    Attributes:
        depths: What is compared.
        spread: Layers between the smallest depth and the largest, None where fewer than two found one.
        apart: Pairs of curves whose intervals share no depth, or of which one found a depth and the other none.
    """

    depths: tuple[FusionDepth, ...]
    spread: int | None
    apart: tuple[tuple[Kind, Kind], ...]

    def __str__(self) -> str:
        found = ", ".join(
            f"{d.kind} none" if d.depth is None else f"{d.kind} {d.depth} ({d.low} to {d.high})" for d in self.depths
        )
        if self.spread is None and not self.apart:
            return f"{found}: no curve locates a fusion"
        spread = "" if self.spread is None else f"{self.spread} layer{'s' * (self.spread != 1)} apart at most, "
        pairs = "; ".join(f"{first} and {second}" for first, second in self.apart)
        return f"{found}: {spread}" + (f"not compatible: {pairs}" if self.apart else "all intervals overlap")


def agreement(depths: Sequence[FusionDepth]) -> Agreement:
    """Compares estimates from different curves of one model.

    Intervals that overlap are compatible with one depth; that is no proof of one. Two that do not are evidence of
    two different depths: what attention looks at, what removal needs and what can be read off are different things.

    Raises ValueError for fewer than two, two of one kind, or models of different depth.
    """
    if len(depths) < 2 or len({d.kind for d in depths}) < len(depths) or len({d.layers for d in depths}) > 1:
        given = ", ".join(f"{d.kind} of {d.layers} layers" for d in depths) or "nothing"
        raise ValueError(f"cannot compare {given}: give estimates of different kinds for one model")
    found = [d.depth for d in depths if d.depth is not None]
    apart = tuple((a.kind, b.kind) for a, b in combinations(depths, 2) if not _compatible(a, b))
    return Agreement(tuple(depths), max(found) - min(found) if len(found) > 1 else None, apart)


def _compatible(a: FusionDepth, b: FusionDepth) -> bool:
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return a.depth is None and b.depth is None
    return a.low <= b.high and b.low <= a.high


def _listed(numbers: Sequence[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}" if first else last


def _shares(
    means: Float[np.ndarray, "rows points"], kind: Kind, width: int
) -> tuple[Float[np.ndarray, "rows layers+1"], Float[np.ndarray, " rows"], Float[np.ndarray, "rows layers"]]:
    """What the first k layers hold, for all k, the whole, and what each layer holds of its own."""
    if kind == "attention":
        parts = np.pad(means.cumsum(axis=1), ((0, 0), (1, 0)))
        return parts, parts[:, -1], means
    if kind == "knockout":
        damage = means[:, :1] - means[:, 1:]
        # The first `width` windows all begin in layer 0.
        parts = np.pad(damage.cumsum(axis=1)[:, width - 1 :], ((0, 0), (1, 0)))
        window, layer = np.ogrid[: damage.shape[1], : damage.shape[1] - width + 1]
        inside = (window - width < layer) & (layer <= window)
        least = np.where(inside, damage[:, :, None], np.inf).min(axis=1)
        added = damage @ np.linalg.pinv(inside.astype(float)).T
        # Each layer is in `width` windows: what adds up is counted so often in the whole.
        return parts, parts[:, -1], width * np.minimum(least, added)
    parts = means - means[:, :1]
    whole = parts[:, -1] if kind == "removal" else parts.max(axis=1)
    return parts, whole, np.diff(parts)


def _seen(mass: Float[np.ndarray, "layers samples"]) -> Float[np.ndarray, "layers seen"]:
    """The samples that have a mass, checked."""
    missing = np.isnan(mass)
    partial_samples = np.flatnonzero(missing.any(axis=0) & ~missing.all(axis=0))
    if partial_samples.size:
        raise ValueError(f"sample {partial_samples[0]} has NaN mass in some layers only: was vision removed there?")
    mass = mass[:, ~missing.any(axis=0)]
    if (mass < 0).any() or not np.isfinite(mass).all():
        raise ValueError("values hold a negative or infinite mass: attention mass is a share of 1")
    return mass


def _resampled_means(
    values: Float[np.ndarray, "points samples"], resamples: int, seed: int
) -> tuple[Float[np.ndarray, "resamples points"], Float[np.ndarray, "resamples points"]]:
    """Means over samples drawn with replacement, and over those that were not drawn: NaN where all were."""
    drawn, left_out = [], []
    for times in _times_drawn(values.shape[1], resamples, seed):
        drawn.append(times @ values.T / values.shape[1])
        never = (times == 0).astype(float)
        with np.errstate(invalid="ignore"):
            left_out.append(never @ values.T / never.sum(axis=1, keepdims=True))
    return np.concatenate(drawn), np.concatenate(left_out)


def _times_drawn(samples: int, resamples: int, seed: int) -> Iterator[Int[np.ndarray, "chunk samples"]]:
    """How often each resample drew each sample."""
    generator = np.random.default_rng(seed)
    chunk = max(WEIGHTS_PER_CHUNK // samples, 1)
    equal = np.full(samples, 1 / samples)
    for done in range(0, resamples, chunk):
        yield generator.multinomial(samples, equal, size=min(chunk, resamples - done))
