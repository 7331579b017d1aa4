"""Fusion depth: how many of a model's first layers text needs to take in the picture."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from jaxtyping import Float

# Slack when a share is compared with the threshold: sums that should be 0.9 may come out just below.
ROUNDING = 1e-9
# Bootstrap weights held at once (32 MiB in float64).
WEIGHTS_PER_CHUNK = 2**22


@dataclass(frozen=True)
class FusionDepth:
    """A fusion depth with its bootstrap interval, as plain Python values (`dataclasses.asdict` is ready for JSON).

    Attributes:
        depth: Number of first layers, or None where there is no fusion to locate; then `low` and `high` are None too.
        low, high: Percentile interval of the depth over resampled samples, both ends included.
        kind: "removal" or "attention".
        threshold: Share that the depth has to reach.
        layers: Layers of the model.
        samples: Samples the estimate rests on.
        level: Confidence level of the interval.
        curve: Mean over the samples at each point: `layers + 1` scores, or `layers` masses; empty without samples.
    """

    depth: int | None
    low: int | None
    high: int | None
    kind: Literal["removal", "attention"]
    threshold: float
    layers: int
    samples: int
    level: float = 0.95
    curve: tuple[float, ...] = ()

    def __str__(self) -> str:
        if self.depth is None:
            return f"none of {self.layers} layers (n={self.samples}, {self.kind})"
        interval = f"{self.level:.0%} CI {self.low} to {self.high}"
        return f"{self.depth} of {self.layers} layers ({interval}, n={self.samples}, {self.kind})"


def fusion_depth(
    values: Float[np.ndarray, "points samples"],
    kind: Literal["removal", "attention"],
    *,
    threshold: float = 0.9,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> FusionDepth:
    """Depth of a causal (removal) or a descriptive (attention) curve.

    With m(k) the mean of `values[k]` over samples and n the number of layers, the share of the first k layers is

    - removal: r(k) = (m(k) - m(0)) / (m(n) - m(0)), where `values[k]` scores each sample with vision removed from layer
      k onward: k = 0 has never seen it, k = n misses nothing. The whole is m(n) - m(0).
    - attention: r(k) = (m(0) + ... + m(k - 1)) / (m(0) + ... + m(n - 1)), where `values[l]` is each sample's attention
      mass from text to vision in layer l. The whole is the sum. Samples that are NaN in all layers, as no query of
      theirs sees a picture, are left out.

    and the depth is the smallest k with r(j) >= threshold for all j >= k. It is None where the bootstrap interval of
    the whole includes 0: there is nothing to locate.

    The interval is a percentile bootstrap over samples, all points of a sample together. Resamples whose whole is 0 or
    of the opposite sign, at most the fraction outside the interval, have no depth and are left out.

    Args:
        values: `[layers + 1, samples]` for removal, `[layers, samples]` for attention.
        kind: How to read them.
        threshold: Share to reach, above 0 and up to 1.
        level: Confidence level.
        resamples: Bootstrap resamples.
        seed: Of the bootstrap.

    Raises:
        ValueError: The shape, the kind or the threshold does not fit, there is one sample only, a score is NaN or
            infinite, a mass is negative, or a sample has a mass in some layers only.
    """
    if kind not in ("removal", "attention"):
        raise ValueError(f"kind is {kind!r}: it must be 'removal' or 'attention'")
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}: it must be above 0 and at most 1")
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] < (2 if kind == "removal" else 1) or values.shape[1] < 1:
        wanted = "[layers + 1, samples]" if kind == "removal" else "[layers, samples]"
        raise ValueError(f"values have shape {list(values.shape)}: {kind} needs {wanted}")
    layers = values.shape[0] - int(kind == "removal")
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
    means = np.concatenate([values.mean(axis=1)[None], _resampled_means(values, resamples, seed)])
    curve = tuple(means[0].tolist())
    parts = means - means[:, :1] if kind == "removal" else np.pad(means.cumsum(axis=1), ((0, 0), (1, 0)))
    whole = parts[:, -1]
    tails = (1 - level) / 2, (1 + level) / 2
    lowest, highest = np.quantile(whole[1:], tails)
    if lowest <= 0 <= highest:
        return result(depth=None, low=None, high=None, curve=curve)
    alike = np.sign(whole) == np.sign(whole[0])
    short = parts[alike] / whole[alike, None] < threshold - ROUNDING
    # One past the last point that falls short; the first point, r(0) = 0, always does.
    depths = layers + 1 - short[:, ::-1].argmax(axis=1)
    low, high = np.quantile(depths[1:], tails, method="inverted_cdf")
    return result(depth=int(depths[0]), low=int(low), high=int(high), curve=curve)


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
) -> Float[np.ndarray, "resamples points"]:
    """Means over samples drawn with replacement: each resample weighs the samples by how often it drew them."""
    generator, samples = np.random.default_rng(seed), values.shape[1]
    chunk = max(WEIGHTS_PER_CHUNK // samples, 1)
    sizes = [min(chunk, resamples - done) for done in range(0, resamples, chunk)]
    equal = np.full(samples, 1 / samples)
    return np.concatenate([generator.multinomial(samples, equal, size=size) @ values.T for size in sizes]) / samples
