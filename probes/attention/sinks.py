"""Attention sinks: positions that take large attention for nearly every query and head, whatever they show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from probes.attention.outliers import SINK_SHARE, outlier_limits, robust_location
from probes.attention.record import AttentionRecord
from probes.optional_packages import require_package
from probes.tokens.token_map import TokenMap

if TYPE_CHECKING:
    import pandas as pd

SINK_STATISTICS = ("sink_rate", "value_norm")
# A small value is also at most the median value times this.
SMALL_VALUE_RATIO = 0.5


@dataclass(frozen=True, eq=False)
class Sinks:
    """The sinks of each layer and sample, by attention and by value norm.

    Attributes:
        layers: Layers on the first axis.
        by_attention: Positions that stand out for at least half of the queries and heads.
        by_value: Positions whose value, of all heads together, has a norm that stands out as small.
        rate: Share of the queries and heads for which a position stands out; NaN outside the source.
        value_ratio: Norm of the value of all heads over the source's median; NaN outside the source.
    """

    layers: tuple[int, ...]
    by_attention: Bool[Tensor, "layers batch positions"]
    by_value: Bool[Tensor, "layers batch positions"]
    rate: Float[Tensor, "layers batch positions"]
    value_ratio: Float[Tensor, "layers batch positions"]

    def leave_out(self, tokens: TokenMap, name: str = "sink") -> TokenMap:
        """Return a map in which the sinks are a group of their own, so that mass and entropy do not count them.

        A sink by attention in any of the layers leaves its group. Record again with this map.

        Args:
            tokens: Map of the inputs.
            name: Name of the new group.

        Raises:
            ValueError: The map is of other inputs.

        Example:
            >>> from probes import record_attention
            >>> with torch.no_grad(), record_attention(model, tokens, statistics=SINK_STATISTICS) as attention:
            ...     output = model(**inputs)
            >>> without = find_sinks(attention, tokens).leave_out(tokens)
            >>> without.groups
            ('pad', 'system', 'vision', 'instruction', 'response', 'sink')
            >>> with torch.no_grad(), record_attention(model, without) as attention:
            ...     output = model(**inputs)
        """
        return tokens.relabel({name: self.by_attention.any(dim=0)[:, : tokens.labels.shape[1]]})

    def frame(self) -> pd.DataFrame:
        """Return a row for each sink of each layer.

        Returns:
            The columns are layer, sample, position, by_attention, by_value, rate, value_ratio.

        Example:
            >>> from probes import record_attention
            >>> with torch.no_grad(), record_attention(model, tokens, statistics=SINK_STATISTICS) as attention:
            ...     output = model(**inputs)
            >>> list(find_sinks(attention, tokens).frame().columns)
            ['layer', 'sample', 'position', 'by_attention', 'by_value', 'rate', 'value_ratio']
        """
        require_package("pandas", "Sinks.frame")
        import pandas as pd

        layer, sample, position = (self.by_attention | self.by_value).nonzero(as_tuple=True)
        columns = {"layer": torch.tensor(self.layers, dtype=torch.long)[layer], "sample": sample, "position": position}
        for name in ("by_attention", "by_value", "rate", "value_ratio"):
            columns[name] = getattr(self, name)[layer, sample, position]
        return pd.DataFrame({name: values.numpy() for name, values in columns.items()})


def find_sinks(
    record: AttentionRecord, tokens: TokenMap, target: str | Sequence[str] = "instruction", source: str = "vision"
) -> Sinks:
    """Find the sinks of `source` for the queries of `target`, in each layer and sample.

    **By attention.** A position stands out for one query of one head if its attention is at least 10 times that of the
    source's median position, and if its score is an outlier among the scores of the source's positions: median plus t
    times 1.4826 times the median absolute deviation. It is a sink if it stands out for at least half of the queries and
    heads.

    **By value norm.** A position is a sink by value norm if the norm of its value, of all heads together, is at most
    half of the source's median, and if its power of 2/3, which is nearly normal, is an outlier in the same way. Sinks
    have small values, so attention to them adds little (Gu et al. 2024, arXiv 2410.10781). A position that is a sink by
    attention alone may be one that the answer needs.

    The limit t follows from the number of positions and the false positive level (`probes.attention.outliers`). If the
    positions are alike and their scores normal, any of them is called a sink with a chance of at most 5% for each
    layer and sample. Nothing is tuned to a model: Kang et al. 2025 (arXiv 2503.03321) read sinks from hidden dimensions
    that have to be known for each model.

    Args:
        record: Attention recorded with statistics "sink_rate" and "value_norm", and `target` among its targets.
        tokens: Map of the inputs.
        target: Group whose queries attend. Several, such as the words of a prompt, count alike.
        source: Group of the positions. Sources with fewer than 8 positions have no sinks.

    Returns:
        The sinks.

    Raises:
        ValueError: An unknown group, or a map of other inputs.
        RuntimeError: A statistic was not recorded, or the model has not run the whole prompt.

    Example:
        >>> from probes import record_attention
        >>> with torch.no_grad(), record_attention(model, tokens, statistics=SINK_STATISTICS) as attention:
        ...     output = model(**inputs)
        >>> sinks = find_sinks(attention, tokens)
        >>> sinks.by_attention.sum(-1).flatten().tolist()  # visual sinks by layer
        [0, 0, 0, 0, 0, 0]
    """
    targets = [target] if isinstance(target, str) else list(target)
    for name in targets:
        if name not in record.targets:
            raise ValueError(f"target is {name!r}: the record has {', '.join(record.targets)}")
    norm = record.value_norm
    rate = record.sink_rate[:, :, :, [record.targets.index(name) for name in targets]].nanmean(dim=3)
    in_source = tokens.mask(source).cpu()
    copies, remainder = divmod(rate.shape[1], max(len(in_source), 1))
    if remainder or in_source.shape[1] > rate.shape[-1]:
        raise ValueError(
            f"the map has {list(in_source.shape)} positions, the record {[rate.shape[1], rate.shape[-1]]}: pass the map "
            "of the recorded inputs"
        )
    generated = rate.shape[-1] - in_source.shape[1]
    in_source = torch.nn.functional.pad(in_source, (0, generated)).repeat_interleave(copies, dim=0)
    rate = rate.mean(dim=2).masked_fill(~in_source, torch.nan)

    norm = norm.square().mean(dim=2).sqrt().masked_fill(~in_source, torch.nan)
    # The square of a vector's norm to the power of 1/3 is nearly normal (Wilson and Hilferty 1931).
    middle, deviation = robust_location(norm ** (2 / 3))
    count = norm.isfinite().sum(dim=-1, keepdim=True)
    limit = (outlier_limits(norm.shape[-1])[count] * deviation).nan_to_num(nan=math.inf)
    ratio = norm / middle**1.5
    return Sinks(
        layers=record.layers,
        by_attention=rate >= SINK_SHARE,
        by_value=(middle - norm ** (2 / 3) >= limit) & (ratio <= SMALL_VALUE_RATIO),
        rate=rate,
        value_ratio=ratio,
    )
