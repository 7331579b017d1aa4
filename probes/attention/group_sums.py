"""Attention statistics by token group, as sums over queries that several calls add up to."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

STATISTICS = ("mass", "entropy", "received", "contribution", "sink_rate", "value_norm")
DEFAULT_STATISTICS = ("mass", "entropy", "received")

_BY_POSITION = ("received", "receivers", "sink_rate", "value_norm", "value_calls")


@dataclass(frozen=True)
class GroupSums:
    """Sums over the queries of each target, in float32. Divide them by the counts to get means.

    Statistics that were not asked for are None.

    Attributes:
        queries: Number of queries that can attend to each source.
        receivers: Number of queries that can attend to each position.
        mass: Attention to each source.
        entropy: Entropy of the attention within each source, in nats.
        received: Attention to each position.
        contribution: Norm of what each source adds to the attention's output.
        sink_rate: Number of queries for which a position's attention stands out within its source.
        value_norm: Norm of the value at each position, summed over calls.
        value_calls: Number of calls with a value at each position.
    """

    queries: Float[Tensor, "batch targets sources"]
    receivers: Float[Tensor, "batch targets positions"]
    mass: Float[Tensor, "batch heads targets sources"]
    entropy: Float[Tensor, "batch heads targets sources"] | None = None
    received: Float[Tensor, "batch heads targets positions"] | None = None
    contribution: Float[Tensor, "batch heads targets sources"] | None = None
    sink_rate: Float[Tensor, "batch heads targets positions"] | None = None
    value_norm: Float[Tensor, "batch heads positions"] | None = None
    value_calls: Float[Tensor, "batch positions"] | None = None

    def __add__(self, other: GroupSums) -> GroupSums:
        """Return the sums over two calls. Positions that the shorter call lacks count as zeros."""
        return GroupSums(**{name: a + b for name, (a, b) in self._padded_pairs(other).items()})

    def beside(self, other: GroupSums) -> GroupSums:
        """Return the sums of two calls with different samples, those of `other` last."""
        return GroupSums(**{name: torch.cat(pair) for name, pair in self._padded_pairs(other).items()})

    def moved(self, first: int, stop: int) -> GroupSums:
        """Return the sums with keys moved to positions of the token map.

        Args:
            first: Position of the first key; not 0 if a sliding cache has dropped the oldest keys.
            stop: Number of positions so far; a static cache has empty slots behind them.
        """
        by_position = self._by_position().items()
        return replace(
            self, **{name: torch.nn.functional.pad(values, (first, 0))[..., :stop] for name, values in by_position}
        )

    def spread(self, positions: Int[Tensor, "batch keys"], stop: int) -> GroupSums:
        """Return the sums with keys moved to positions of the token map, in a call without some of its tokens.

        Args:
            positions: Position of each key. Filler keys have position 0 and add zeros there.
            stop: Number of positions so far.
        """

        def to_positions(values: Tensor) -> Tensor:
            index = positions.to(values.device).view(len(values), *[1] * (values.ndim - 2), -1).expand_as(values)
            return values.new_zeros(*values.shape[:-1], stop).scatter_add_(-1, index, values)

        return replace(self, **{name: to_positions(values) for name, values in self._by_position().items()})

    def _by_position(self) -> dict[str, Tensor]:
        """Return the recorded fields whose last dimension is positions."""
        return {name: values for name in _BY_POSITION if (values := getattr(self, name)) is not None}

    def _padded_pairs(self, other: GroupSums) -> dict[str, tuple[Tensor, Tensor]]:
        """Return each recorded field of both, padded to the same length of the last dimension."""
        pairs = {}
        for field in fields(self):
            a, b = getattr(self, field.name), getattr(other, field.name)
            if a is not None:
                pairs[field.name] = _pad_last_dimension(a, b.shape[-1]), _pad_last_dimension(b, a.shape[-1])
        return pairs


def _pad_last_dimension(values: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, max(width - values.shape[-1], 0)))
