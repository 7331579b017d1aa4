"""Attention statistics by token group, summed over chunks of queries.

Within one source, the scores s of a query give the share of each key p = softmax(s), the log-sum-exp
L = max s - ln max p, and the entropy H = -sum p ln p = L - sum p s. The source's mass is exp(L) over the sum of exp(L)
of all sources. So each score is computed once, and no logarithm of a score is needed. Attention that is too small for
float32 still has an entropy.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.attention.layout import GroupLayout

# Score of a key that the query cannot attend to.
HIDDEN_SCORE = torch.finfo(torch.float32).min / 2


@dataclass(frozen=True)
class GroupSums:
    """Sums over the queries of each target, in float32. Divide them by the counts to get means.

    Attributes:
        mass: Attention to each source.
        entropy: Entropy of the attention within each source, in nats.
        queries: Number of queries that can attend to each source.
        received: Attention to each position.
        receivers: Number of queries that can attend to each position.
    """

    mass: Float[Tensor, "batch heads targets sources"]
    entropy: Float[Tensor, "batch heads targets sources"]
    queries: Float[Tensor, "batch targets sources"]
    received: Float[Tensor, "batch heads targets positions"]
    receivers: Float[Tensor, "batch targets positions"]

    def __add__(self, other: GroupSums) -> GroupSums:
        """Return the sums over two calls. Positions that the shorter call lacks count as zeros."""
        return GroupSums(*(a + b for a, b in self._padded_pairs(other)))

    def beside(self, other: GroupSums) -> GroupSums:
        """Return the sums of two calls with different samples, those of `other` last."""
        return GroupSums(*(torch.cat(pair) for pair in self._padded_pairs(other)))

    def moved(self, first: int, stop: int) -> GroupSums:
        """Return the sums with keys moved to positions of the token map.

        Args:
            first: Position of the first key; not 0 if a sliding cache has dropped the oldest keys.
            stop: Number of positions so far; a static cache has empty slots behind them.
        """
        pad = torch.nn.functional.pad
        received, receivers = (pad(values, (first, 0))[..., :stop] for values in (self.received, self.receivers))
        return replace(self, received=received, receivers=receivers)

    def spread(self, positions: Int[Tensor, "batch keys"], stop: int) -> GroupSums:
        """Return the sums with keys moved to positions of the token map, in a call without some of its tokens.

        Args:
            positions: Position of each key. Filler keys have position 0 and add zeros there.
            stop: Number of positions so far.
        """

        def to_positions(values: Tensor) -> Tensor:
            index = positions.view(len(values), *[1] * (values.ndim - 2), -1).expand_as(values)
            return values.new_zeros(*values.shape[:-1], stop).scatter_add_(-1, index, values)

        return replace(self, received=to_positions(self.received), receivers=to_positions(self.receivers))

    def _padded_pairs(self, other: GroupSums) -> list[tuple[Tensor, Tensor]]:
        """Return each field of both, padded to the same length of the last dimension."""
        pairs = [(getattr(self, field.name), getattr(other, field.name)) for field in fields(self)]
        return [(_pad_last_dimension(a, b.shape[-1]), _pad_last_dimension(b, a.shape[-1])) for a, b in pairs]


def _pad_last_dimension(values: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, max(width - values.shape[-1], 0)))


@torch.no_grad()
def group_statistics(
    query: Float[Tensor, "batch heads queries width"],
    key: Float[Tensor, "batch kv_heads keys width"],
    scaling: float,
    layout: GroupLayout,
    softcap: float | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
) -> GroupSums:
    """Return the sums of attention mass, entropy and received attention of one layer's call.

    A query that cannot attend to any key of a source adds nothing to that source's sums and counts.

    Args:
        query: Queries after rotary embedding.
        key: Keys after rotary embedding, including the cached ones, not repeated for grouped queries.
        scaling: Factor of the scores.
        layout: Queries and keys that count.
        softcap: Cap of the scores, which become softcap * tanh(score / softcap), as in Gemma 2.
        sinks: A score for each head that takes attention and has no key, as in gpt-oss. Masses then sum to less than 1.

    Returns:
        The sums, with the layout's targets and sources, by key of the call.
    """
    group = query.shape[1] // key.shape[1]
    key_heads_per_call = layout.heads // group
    parts = [
        _sum_heads(
            query[:, first * group : (first + key_heads_per_call) * group],
            key[:, first : first + key_heads_per_call],
            scaling,
            layout,
            softcap,
            None if sinks is None else sinks[first * group : (first + key_heads_per_call) * group],
        )
        for first in range(0, key.shape[1], key_heads_per_call)
    ]
    mass, entropy, received = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    return GroupSums(mass, entropy, layout.queries, received, layout.receivers)


def _sum_heads(
    query: Float[Tensor, "batch heads queries width"],
    key: Float[Tensor, "batch kv_heads keys width"],
    scaling: float,
    layout: GroupLayout,
    softcap: float | None,
    sinks: Float[Tensor, " heads"] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return mass, entropy and received attention of some heads, as `group_statistics` sums them."""
    batch, heads, _, width = query.shape
    kv_heads, keys, columns = key.shape[1], key.shape[2], layout.columns
    if columns is not None:
        key = key.gather(2, columns[:, None, :, None].expand(-1, kv_heads, -1, width))
    key = key.float().mT
    sources = layout.queries.shape[-1]
    mass = query.new_zeros(batch, heads, *layout.queries.shape[1:], dtype=torch.float32)
    entropy = torch.zeros_like(mass)
    received = mass.new_zeros(batch, heads, mass.shape[2], key.shape[-1])
    # Autocast would run the matrix products below in half precision.
    with torch.autocast(query.device.type, enabled=False):
        for chunk in layout.chunks:
            rows = chunk.rows[:, None, :, None].expand(-1, heads, -1, width)
            # Heads that share a key head are adjacent: fold them into the queries instead of repeating the keys.
            folded = (query.gather(2, rows).float() * scaling).view(batch, kv_heads, -1, width)
            log_sum_exp = mass.new_full((batch, heads, chunk.rows.shape[1], sources), HIDDEN_SCORE)
            source_entropy = torch.zeros_like(log_sum_exp)
            shares = []
            for block in chunk.blocks:
                scores = (folded @ key[..., block.first : block.stop]).view(batch, heads, chunk.rows.shape[1], -1)
                if softcap is not None:
                    scores = scores.div_(softcap).tanh_().mul_(softcap)
                if block.clear < block.stop:
                    tail = scores[..., block.clear - block.first :]
                    if block.bias is not None:
                        tail += block.bias[:, None]
                    tail.masked_fill_(~block.visible[:, None], HIDDEN_SCORE)
                top, share = scores.amax(dim=-1), scores.softmax(dim=-1)
                block_log_sum_exp = top - share.amax(dim=-1).log()
                has_visible_key = block.has_visible_key[:, None]
                log_sum_exp[..., block.source] = torch.where(has_visible_key, block_log_sum_exp, HIDDEN_SCORE)
                block_entropy = (block_log_sum_exp - scores.mul_(share).sum(dim=-1)).clamp_(min=0.0)
                source_entropy[..., block.source] = torch.where(has_visible_key, block_entropy, 0.0)
                shares.append(share)
            total = log_sum_exp.logsumexp(dim=-1, keepdim=True)
            if sinks is not None:
                total = torch.logaddexp(total, sinks.float().view(1, -1, 1, 1))
            masses = (log_sum_exp - total).exp().masked_fill_(log_sum_exp == HIDDEN_SCORE, 0.0)
            members = chunk.members.mT[:, None]
            mass[:, :, chunk.targets] += members @ masses
            entropy[:, :, chunk.targets] += members @ source_entropy
            for block, share in zip(chunk.blocks, shares, strict=True):
                weights = members * masses[..., None, :, block.source]
                received[:, :, chunk.targets, block.first : block.stop] += weights @ share
    return mass, entropy, layout.to_keys(received, keys)
