"""Fusion onset: the first layer that needs the image, from scores with the image hidden in the first k layers.

docs/fusion_depth.md has the formula, and what the onset can and cannot show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from transformers import PreTrainedModel

from probes.fusion.bootstrap import require_bootstrap, resampled_means
from probes.fusion.curves import ScoreFunction, points_of_curve, removal_scores
from probes.fusion.depth import READING_SHARE, ROUNDING_SLACK
from probes.tokens.token_map import TokenMap


def onset_curve(
    model: PreTrainedModel,
    tokens: TokenMap,
    inputs: Mapping[str, Any],
    score: ScoreFunction,
    ends: Sequence[int] | None = None,
) -> Float[np.ndarray, "ends samples"]:
    """Score the model with vision removed from the first k layers, for each k of `ends`.

    The counterpart of `removal_curve`: there the image leaves after k layers, here it arrives after k layers. It arrives
    as the projector made it: the first k layers have not changed the visual tokens.

    Args:
        model: A transformers model with a decoder.
        tokens: Map of `inputs`.
        inputs: Arguments of the model's forward call.
        score: Returns one score for each sample from the logits.
        ends: Numbers of first layers without vision. 0 removes nothing; the number of layers removes vision from all.
            By default 0, 1, ..., all layers.

    Returns:
        Scores `[ends, samples]`.

    Raises:
        ValueError: An end is outside the model, or the score reads padding.

    Example:
        >>> from probes.fusion.curves import answer_logprob
        >>> score = answer_logprob(tokens, torch.tensor([5]))  # token 5 is the answer
        >>> onset_curve(model, tokens, inputs, score, ends=[0, 3, 6]).shape
        (3, 1)
    """
    _, ends = points_of_curve(model, "ends", ends)
    return removal_scores(model, tokens, inputs, score, [range(end) for end in ends])


@dataclass(frozen=True)
class FusionOnset:
    """A fusion onset with its bootstrap interval, as plain Python values (`dataclasses.asdict` is ready for JSON).

    Attributes:
        onset: First layer, counted from 1, that needs the image; None if hiding the image costs nothing. Then `low` and
            `high` are None too.
        low, high: Percentile interval of the onset over resampled samples, both ends included.
        threshold: Share of the total that has to be lost.
        layers: Layers of the model.
        samples: Samples that the estimate uses.
        level: Confidence level of the interval.
        curve: Mean score with the image hidden in the first 0, 1, ..., all layers.
        reads: Layers, counted from 1, whose own loss is above 10% of the total at the lower end of its interval.
    """

    onset: int | None
    low: int | None
    high: int | None
    threshold: float
    layers: int
    samples: int
    level: float = 0.95
    curve: tuple[float, ...] = ()
    reads: tuple[int, ...] = ()

    def __str__(self) -> str:
        if self.onset is None:
            return f"none of {self.layers} layers (n={self.samples}, onset)"
        interval = f"{self.level:.0%} CI {self.low} to {self.high}"
        return f"layer {self.onset} of {self.layers} ({interval}, n={self.samples}, onset)"


def fusion_onset(
    values: Float[np.ndarray, "layers+1 samples"],
    *,
    threshold: float = 0.1,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> FusionOnset:
    """Estimate the first layer that needs the image, from the curve that `onset_curve` measures.

    With m(k) the mean of `values[k]` over samples and n the number of layers, the share lost by hiding the image in the
    first k layers is r(k) = (m(0) - m(k)) / (m(0) - m(n)). The onset is the smallest k with r(j) >= threshold for all
    j >= k. So the image may arrive after k - 1 layers, and not later.

    The interval is a percentile bootstrap over samples; each resample keeps all points of a sample together. The onset
    is None unless the interval of the total loss m(0) - m(n) lies above 0. Resamples whose total is not above 0 have no
    onset and are left out.

    Args:
        values: `values[k]` scores each sample with the image hidden in the first k layers, `[layers + 1, samples]`.
        threshold: Share of the total that has to be lost, above 0 and up to 1.
        level: Confidence level.
        resamples: Number of bootstrap resamples.
        seed: Seed of the bootstrap.

    Returns:
        The onset with its interval.

    Raises:
        ValueError: The shape or an argument does not fit, there is one sample only, or a score is not finite.

    Example:
        >>> import numpy as np
        >>> right = np.array([1, 1, 0, 0, 0])  # with the image hidden in the first 0, 1, ..., 4 layers
        >>> print(fusion_onset(right[:, None].repeat(40, axis=1)))
        layer 2 of 4 (95% CI 2 to 2, n=40, onset)
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}: it must be above 0 and at most 1")
    require_bootstrap(level, resamples)
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] < 2 or values.shape[1] < 2:
        raise ValueError(
            f"values have shape {list(values.shape)}: an onset needs [layers + 1, samples] with at least 2 samples"
        )
    if not np.isfinite(values).all():
        raise ValueError("values hold a score that is not finite: every sample needs a finite score at every point")
    layers, samples = values.shape[0] - 1, values.shape[1]
    # The first row is the estimate, the others are the resamples.
    means = np.concatenate([values.mean(axis=1)[None], resampled_means(values, resamples, seed)[0]])
    curve, tails = tuple(means[0].tolist()), ((1 - level) / 2, (1 + level) / 2)
    lost = means[:, :1] - means
    total = lost[:, -1]
    if np.quantile(total[1:], tails[0]) <= 0:
        return FusionOnset(None, None, None, threshold, layers, samples, level, curve)
    shares = lost[total > 0] / total[total > 0, None]
    # One past the last point that loses less; hiding the image in no layer loses nothing.
    onsets = layers + 1 - (shares < threshold - ROUNDING_SLACK)[:, ::-1].argmax(axis=1)
    low, high = np.quantile(onsets[1:], tails, method="inverted_cdf")
    lowest_own_shares = np.quantile(np.diff(shares)[1:], tails[0], axis=0)
    reads = tuple((np.flatnonzero(lowest_own_shares > READING_SHARE) + 1).tolist())
    return FusionOnset(int(onsets[0]), int(low), int(high), threshold, layers, samples, level, curve, reads)
