"""Fusion depth: how many of a model's first layers text needs to take in the image.

docs/fusion_depth.md has the formulas, and what each of the four curves can and cannot show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float

from probes.fusion.bootstrap import require_bootstrap, resampled_means

CurveKind = Literal["attention", "removal", "knockout", "readout"]

# Attention mass that counts as no attention. The output of attention is a convex combination: removing sources of total
# mass m moves it by at most m times the distance between what is removed and what stays.
ATTENTION_FLOOR = 1e-3
# A layer is named in `reads` if the lower end of its interval is above this share of the total.
READING_SHARE = 0.1
# Slack for comparing a share with the threshold: sums that should be 0.9 may come out just below.
ROUNDING_SLACK = 1e-9


@dataclass(frozen=True)
class FusionDepth:
    """A fusion depth with its bootstrap interval, as plain Python values (`dataclasses.asdict` is ready for JSON).

    Attributes:
        depth: Number of first layers, or None if there is no fusion to locate; then `low` and `high` are None too.
        low, high: Percentile interval of the depth over resampled samples, both ends included.
        kind: Curve that was read: "attention", "removal", "knockout" or "readout".
        threshold: Share that the first `depth` layers have to reach.
        layers: Layers of the model.
        samples: Samples that the estimate uses.
        level: Confidence level of the interval.
        curve: Mean over the samples at each point of the values; empty without samples.
        reads: Layers, counted from 1, whose own share of the total is above 10% at the lower end of its interval.
    """

    depth: int | None
    low: int | None
    high: int | None
    kind: CurveKind
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
        summary = f"{self.depth} of {self.layers} layers ({interval}, n={self.samples}, {self.kind})"
        if self.reads in ((), (self.depth,)):
            return summary
        return f"{summary}, read at layer{'s' * (len(self.reads) > 1)} {_join_numbers(self.reads)}"


def fusion_depth(
    values: Float[np.ndarray, "points samples"],
    kind: CurveKind,
    *,
    width: int | None = None,
    threshold: float = 0.9,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> FusionDepth:
    """Estimate the fusion depth from one of the four curves that `probes.fusion.curves` measures.

    With m(i) the mean of `values[i]` over samples and n the number of layers, r(k) is the share of the first k layers:

    - attention: r(k) = (m(0) + ... + m(k - 1)) / (m(0) + ... + m(n - 1)). `values[l]` is each sample's attention mass
      from text to vision in layer l. Samples that are NaN in all layers are left out: none of their queries can attend
      to an image.
    - removal: r(k) = (m(k) - m(0)) / (m(n) - m(0)). `values[k]` scores each sample with vision removed from layer k
      onward. At k = 0 no layer has vision; at k = n nothing is removed.
    - knockout: r(k) = sum of d(i) over the windows that begin within the first k layers / sum of all d(i), with
      d(i) = m(0) - m(1 + i). `values[0]` scores the intact model. `values[1 + i]` scores the model with attention from
      text to vision blocked in the `width` layers that end at layer i. Windows are clipped to the model, so there are
      n + width - 1.
    - readout: r(k) = (m(k) - m(0)) / (max of m - m(0)). `values[k]` is whether the image's content was read off each
      sample's text after k layers.

    The depth is the smallest k with r(j) >= threshold for all j >= k. A read-out may fade again, so its depth is the
    smallest k with r(k) >= threshold. The interval is a percentile bootstrap over samples; each resample keeps all
    points of a sample together.

    The depth is None if the bootstrap interval of the total (the denominator) includes 0. Two curves need another test:

    - Attention is never 0: its depth is None unless the interval of the largest m lies above 0.001.
    - The maximum of a readout is never negative. For this decision alone, each resample takes the best point of the
      samples it drew, and measures the gain there on the samples it left out.

    Resamples whose total is 0 or has the opposite sign have no depth and are left out. They are at most the fraction
    outside the interval.

    `reads` compares each layer's own share with 0.1. The own share is r(k) - r(k - 1), except for knockout. There it is
    the share of min(a, b): a is the least d of the windows around the layer, b the layer's damage in a least squares
    fit in which the damage of a window is the sum over its layers.

    Args:
        values: `[layers, samples]` for attention, `[layers + 1, samples]` for removal and readout,
            `[layers + width, samples]` for knockout.
        kind: Curve that `values` hold: "attention", "removal", "knockout" or "readout".
        width: Layers in a knock-out window, as `knockout_curve` was given; 1 by default. For knockout alone.
        threshold: Share to reach, above 0 and up to 1.
        level: Confidence level.
        resamples: Number of bootstrap resamples.
        seed: Seed of the bootstrap.

    Returns:
        The depth with its interval.

    Raises:
        ValueError: The shape or an argument does not fit, there is one sample only, a score is NaN or
            infinite, a mass is negative, or a sample has a mass in some layers only.

    Example:
        >>> import numpy as np
        >>> right = np.array([0, 0, 1, 1, 1])  # without vision from layer 0, 1, ..., 4 onward
        >>> print(fusion_depth(right[:, None].repeat(40, axis=1), "removal"))
        2 of 4 layers (95% CI 2 to 2, n=40, removal)
    """
    if kind not in get_args(CurveKind):
        raise ValueError(f"kind is {kind!r}: it must be one of {', '.join(map(repr, get_args(CurveKind)))}")
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}: it must be above 0 and at most 1")
    require_bootstrap(level, resamples)
    if kind != "knockout" and width is not None:
        raise ValueError(f"width is {width}: only knockout has windows; leave it out for {kind}")
    width = 1 if width is None else width
    if not isinstance(width, int | np.integer) or width < 1:
        raise ValueError(f"width is {width!r}: give the layers in a window of the knock-out curve, at least 1")
    values = np.asarray(values, dtype=np.float64)
    extra = {"attention": 0, "removal": 1, "knockout": width, "readout": 1}[kind]
    if values.ndim != 2 or values.shape[0] <= extra or values.shape[1] < 1:
        raise ValueError(
            f"values have shape {list(values.shape)}: {kind} needs [layers{f' + {extra}' if extra else ''}, samples]"
        )
    layers = values.shape[0] - extra
    if kind == "attention":
        values = _drop_samples_without_mass(values)
    elif not np.isfinite(values).all():
        raise ValueError("values hold a score that is not finite: every sample needs a finite score at every point")

    samples = values.shape[1]
    result = partial(FusionDepth, kind=kind, threshold=threshold, layers=layers, samples=samples, level=level)
    if samples == 0:
        return result(depth=None, low=None, high=None)
    if samples == 1:
        raise ValueError("values hold a single sample: a bootstrap interval needs at least 2")
    # The first row is the estimate, the others are the resamples.
    drawn, left_out = resampled_means(values, resamples, seed)
    means = np.concatenate([values.mean(axis=1)[None], drawn])
    result = partial(result, curve=tuple(means[0].tolist()))
    tails = (1 - level) / 2, (1 + level) / 2

    first_layers, total, own = _layer_contributions(means, kind, width)
    # Quantity whose interval must exclude 0. It is clipped where the total cannot be negative: no evidence is then 0.
    evidence = total[1:]
    if kind == "attention":
        evidence = (drawn.max(axis=1) - ATTENTION_FLOOR).clip(0)
    elif kind == "readout":
        peak = drawn.argmax(axis=1)[:, None]
        evidence = (np.take_along_axis(left_out, peak, axis=1)[:, 0] - left_out[:, 0]).clip(0)
    evidence_low, evidence_high = np.nanquantile(evidence, tails)
    if evidence_low <= 0 <= evidence_high:
        return result(depth=None, low=None, high=None)

    same_sign = np.sign(total) == np.sign(total[0])
    too_low = first_layers[same_sign] / total[same_sign, None] < threshold - ROUNDING_SLACK
    # Readout: the first point that reaches the threshold. Others: one past the last point below it; r(0) = 0 always is.
    depths = too_low.argmin(axis=1) if kind == "readout" else layers + 1 - too_low[:, ::-1].argmax(axis=1)
    low, high = np.quantile(depths[1:], tails, method="inverted_cdf")
    lowest_own_shares = np.quantile((own[same_sign] / total[same_sign, None])[1:], tails[0], axis=0)
    reads = tuple((np.flatnonzero(lowest_own_shares > READING_SHARE) + 1).tolist())
    return result(depth=int(depths[0]), low=int(low), high=int(high), reads=reads)


@dataclass(frozen=True)
class Agreement:
    """How far several estimates of one model's fusion depth agree.

    Attributes:
        depths: Estimates that were compared.
        spread: Layers between the smallest depth and the largest; None if fewer than two estimates have a depth.
        apart: Pairs of curves whose intervals share no depth, or of which only one has a depth.
    """

    depths: tuple[FusionDepth, ...]
    spread: int | None
    apart: tuple[tuple[CurveKind, CurveKind], ...]

    def __str__(self) -> str:
        estimates = ", ".join(
            f"{d.kind} none" if d.depth is None else f"{d.kind} {d.depth} ({d.low} to {d.high})" for d in self.depths
        )
        if self.spread is None and not self.apart:
            return f"{estimates}: no curve locates a fusion"
        spread = "" if self.spread is None else f"{self.spread} layer{'s' * (self.spread != 1)} apart at most, "
        pairs = "; ".join(f"{first} and {second}" for first, second in self.apart)
        return f"{estimates}: {spread}" + (f"not compatible: {pairs}" if self.apart else "all intervals overlap")


def agreement(depths: Sequence[FusionDepth]) -> Agreement:
    """Compare the estimates of different curves for one model.

    Intervals that overlap are compatible with one depth but do not prove it. Intervals that do not overlap are evidence
    of different depths: where text attends, what removal needs and what can be read out are different things.

    Args:
        depths: At least two estimates of one model, each of another curve.

    Returns:
        The largest distance between the depths, and the pairs that are not compatible.

    Raises:
        ValueError: There are fewer than two estimates, two of one kind, or models with different numbers of layers.

    Example:
        >>> import numpy as np
        >>> removal = fusion_depth(np.array([[0, 0], [0, 0], [1, 1]]), "removal")
        >>> attention = fusion_depth(np.array([[0, 0], [1, 1]]), "attention")
        >>> print(agreement([removal, attention]))
        removal 2 (2 to 2), attention 2 (2 to 2): 0 layers apart at most, all intervals overlap
    """
    if len(depths) < 2 or len({d.kind for d in depths}) < len(depths) or len({d.layers for d in depths}) > 1:
        given = ", ".join(f"{d.kind} of {d.layers} layers" for d in depths) or "nothing"
        raise ValueError(f"cannot compare {given}: give estimates of different kinds for one model")
    located = [d.depth for d in depths if d.depth is not None]
    apart = tuple((a.kind, b.kind) for a, b in combinations(depths, 2) if not _are_compatible(a, b))
    return Agreement(tuple(depths), max(located) - min(located) if len(located) > 1 else None, apart)


def _are_compatible(a: FusionDepth, b: FusionDepth) -> bool:
    """Return whether two intervals overlap, or neither estimate has a depth."""
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return a.depth is None and b.depth is None
    return a.low <= b.high and b.low <= a.high


def _join_numbers(numbers: Sequence[int]) -> str:
    """Return "1", "1 and 2", "1, 2 and 3" and so on."""
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}" if first else last


def _layer_contributions(
    means: Float[np.ndarray, "rows points"], kind: CurveKind, width: int
) -> tuple[Float[np.ndarray, "rows layers+1"], Float[np.ndarray, " rows"], Float[np.ndarray, "rows layers"]]:
    """Return the contribution of the first k layers for all k, the total, and each layer's own contribution."""
    if kind == "attention":
        first_layers = np.pad(means.cumsum(axis=1), ((0, 0), (1, 0)))
        return first_layers, first_layers[:, -1], means
    if kind == "knockout":
        damage = means[:, :1] - means[:, 1:]
        # For example 3 layers and width 2 give 4 windows: layer 0; 0 and 1; 1 and 2; layer 2. Windows 0 and 1 begin in layer
        # 0, window 2 in layer 1, window 3 in layer 2. So the first `width` windows count for layer 0, and then one a layer.
        first_layers = np.pad(damage.cumsum(axis=1)[:, width - 1 :], ((0, 0), (1, 0)))
        # inside[w, l]: whether window w holds layer l. A layer's own damage is at most that of each window that holds it, and
        # at most what a least-squares fit of the windows by sums over their layers gives it.
        window, layer = np.ogrid[: damage.shape[1], : damage.shape[1] - width + 1]
        inside = (window - width < layer) & (layer <= window)
        least_damage = np.where(inside, damage[:, :, None], np.inf).min(axis=1)
        fitted_damage = damage @ np.linalg.pinv(inside.astype(float)).T
        # Each layer is in `width` windows, so the total counts its damage `width` times.
        return first_layers, first_layers[:, -1], width * np.minimum(least_damage, fitted_damage)
    first_layers = means - means[:, :1]
    total = first_layers[:, -1] if kind == "removal" else first_layers.max(axis=1)
    return first_layers, total, np.diff(first_layers)


def _drop_samples_without_mass(mass: Float[np.ndarray, "layers samples"]) -> Float[np.ndarray, "layers with_mass"]:
    """Check the attention mass, and return the samples that have one."""
    missing = np.isnan(mass)
    partly_missing = np.flatnonzero(missing.any(axis=0) & ~missing.all(axis=0))
    if partly_missing.size:
        raise ValueError(
            f"sample {partly_missing[0]} has NaN mass in layers {np.flatnonzero(missing[:, partly_missing[0]]).tolist()} "
            "only: was vision removed there, or is it outside the sliding window of these layers?"
        )
    mass = mass[:, ~missing.any(axis=0)]
    if (mass < 0).any() or not np.isfinite(mass).all():
        raise ValueError("values hold a negative or infinite mass: attention mass is a share of 1")
    return mass
