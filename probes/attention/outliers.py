"""When one of several values is too large to be one of them: a robust test without constants of a model."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

# Probability that any of the tokens of one source is found to be a sink although all are alike.
SINK_LEVEL = 0.05
# A sink stands out for at least this share of the queries and heads.
SINK_SHARE = 0.5
# A token stands out if it also gets this many times the attention of the median token.
SINK_ATTENTION_RATIO = 10.0
# The median absolute deviation of a normal distribution times this is its standard deviation.
DEVIATIONS_TO_SIGMA = 1.4826
# Relative to a sample's standard deviation, the median absolute deviation uses 37% of the information.
DEVIATION_EFFICIENCY = 0.37
# The deviation of fewer values is too uncertain.
FEWEST_VALUES = 8


def outlier_limits(most: int) -> Float[Tensor, " counts"]:
    """Return how many standard deviations above the median a value of n stands out, for n from 0 to `most`.

    The standard deviation is estimated from the median absolute deviation of the n values, so the limit is a quantile of
    Student's t with 0.37 n degrees of freedom (Wallace's approximation). Its tail is `SINK_LEVEL * SINK_SHARE / n`.
    One query calls each of n like tokens an outlier with this probability. By Markov's inequality the chance that any
    of them is one for a share `SINK_SHARE` of the queries and heads is then at most `SINK_LEVEL`, whatever the
    dependence between queries and heads.

    Args:
        most: Largest number of values.

    Returns:
        Limits `[most + 1]`; infinite for fewer than 8 values.

    Example:
        >>> [round(float(limit), 1) for limit in outlier_limits(576)[[4, 9, 36, 576]]]
        [inf, 6.6, 4.0, 4.0]
    """
    counts = torch.arange(most + 1, dtype=torch.float64)
    normal = -torch.special.ndtri(SINK_LEVEL * SINK_SHARE / counts.clamp(min=1))
    freedom = (DEVIATION_EFFICIENCY * counts).clamp(min=1)
    scaled = normal * (8 * freedom + 3) / (8 * freedom + 1)
    limits = (freedom * torch.expm1(scaled.square() / freedom)).sqrt()
    return limits.masked_fill(counts < FEWEST_VALUES, math.inf).float()


def robust_location(values: Float[Tensor, "... n"]) -> tuple[Float[Tensor, "... 1"], Float[Tensor, "... 1"]]:
    """Return the median of the last dimension, and a standard deviation from the median absolute deviation.

    Args:
        values: Values; NaN is left out.

    Returns:
        Both, with a last dimension of 1. With an even number of values, the median is the lower middle one.

    Example:
        >>> robust_location(torch.tensor([1.0, 2.0, 3.0, 100.0, torch.nan]))
        (tensor([2.]), tensor([1.4826]))
    """
    middle = values.nanmedian(dim=-1, keepdim=True).values
    return middle, DEVIATIONS_TO_SIGMA * (values - middle).abs().nanmedian(dim=-1, keepdim=True).values
