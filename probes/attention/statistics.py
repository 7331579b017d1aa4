"""Attention statistics by token group, summed over chunks of queries.

Within one source, the scores s of a query give the share of each key p = softmax(s), the log-sum-exp
L = max s - ln max p, and the entropy H = -sum p ln p = L - sum p s. The source's mass is exp(L) over the sum of exp(L)
of all sources. So each score is computed once, and no logarithm of a score is needed. Attention that is too small for
float32 still has an entropy.

If the attention kernel reports the log-sum-exp over all keys, the mass of the widest source is what the other sources
leave of 1, and its scores are not computed.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from probes.attention.group_sums import DEFAULT_STATISTICS, GroupSums
from probes.attention.layout import GroupLayout, QueryChunk, SourceBlock
from probes.attention.outliers import SINK_ATTENTION_RATIO, outlier_limits, robust_location

# Score of a key that the query cannot attend to.
HIDDEN_SCORE = torch.finfo(torch.float32).min / 2


@dataclass(frozen=True)
class AttentionCall:
    """The tensors of one call of an attention function.

    Attributes:
        query: Queries after rotary embedding.
        key: Keys after rotary embedding, including the cached ones, not repeated for grouped queries.
        scaling: Factor of the scores.
        value: Values, as the keys; needed for contribution and value norm.
        softcap: Cap of the scores, which become softcap * tanh(score / softcap), as in Gemma 2.
        sinks: A score for each head that takes attention and has no key, as in gpt-oss. Masses then sum to less than 1.
        log_sum_exp: Log-sum-exp of each query's scores over all keys; needed for a layout with a rest.
        output_gram: W^T W of each head's output projection W; needed for contribution.
        gate: Factors of each head's output before the projection; None for 1.
    """

    query: Float[Tensor, "batch heads queries width"]
    key: Float[Tensor, "batch kv_heads keys width"]
    scaling: float
    value: Float[Tensor, "batch kv_heads keys value_width"] | None = None
    softcap: float | None = None
    sinks: Float[Tensor, " heads"] | None = None
    log_sum_exp: Float[Tensor, "batch heads queries"] | None = None
    output_gram: Float[Tensor, "heads value_width value_width"] | None = None
    gate: Float[Tensor, "batch heads queries value_width"] | None = None

    def select_heads(self, heads: Tensor | slice, key_heads: Tensor | slice) -> AttentionCall:
        """Return the call of some query heads, with the key head of each of them, or of all that share a key head."""
        query_tensors = {
            name: values[:, heads]
            for name in ("query", "log_sum_exp", "gate")
            if (values := getattr(self, name)) is not None
        }
        return replace(
            self,
            **query_tensors,
            key=self.key[:, key_heads],
            value=None if self.value is None else self.value[:, key_heads],
            sinks=None if self.sinks is None else self.sinks.flatten()[heads],
            output_gram=None if self.output_gram is None else self.output_gram[heads],
        )


@torch.no_grad()
def group_statistics(
    call: AttentionCall, layout: GroupLayout, statistics: Collection[str] = DEFAULT_STATISTICS
) -> GroupSums:
    """Return the sums of one layer's call.

    A query that cannot attend to any key of a source adds nothing to that source's sums and counts.

    Args:
        call: Queries, keys and what else the statistics need.
        layout: Queries and keys that count. One with a rest gives mass alone.
        statistics: Names from `STATISTICS`. Mass is always among the results.

    Returns:
        The sums, with the layout's targets and sources, by key of the call.
    """
    key_heads = call.key.shape[1]
    group = call.query.shape[1] // key_heads
    key_heads_per_call = layout.heads // group
    parts = [
        _HeadSums(
            call.select_heads(
                slice(first * group, (first + key_heads_per_call) * group), slice(first, first + key_heads_per_call)
            ),
            layout,
            statistics,
        ).over_chunks()
        for first in range(0, key_heads, key_heads_per_call)
    ]
    sums = {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}
    if call.value is not None and "value_norm" in statistics:
        norms = call.value.float().norm(dim=-1) * layout.is_key[:, None]
        sums["value_norm"] = norms.repeat_interleave(group, dim=1)
        sums["value_calls"] = layout.is_key
    return GroupSums(layout.queries, layout.receivers, **sums)


class _HeadSums:
    """The sums of some heads, filled one chunk of queries at a time."""

    def __init__(self, call: AttentionCall, layout: GroupLayout, statistics: Collection[str]) -> None:
        self.layout, self.call = layout, call
        batch, heads = call.query.shape[:2]
        key, value = call.key, call.value if "contribution" in statistics else None
        if layout.columns is not None:
            columns = layout.columns[:, None, :, None]
            key = key.gather(2, columns.expand(-1, key.shape[1], -1, key.shape[3]))
            if value is not None:
                value = value.gather(2, columns.expand(-1, value.shape[1], -1, value.shape[3]))
        self.key, self.value = key.float().mT, None if value is None else value.float()
        by_source = call.query.new_zeros(batch, heads, *layout.queries.shape[1:], dtype=torch.float32)
        by_column = (batch, heads, by_source.shape[2], self.key.shape[-1])
        self.mass = by_source
        self.entropy = torch.zeros_like(by_source) if "entropy" in statistics else None
        self.contribution = torch.zeros_like(by_source) if "contribution" in statistics else None
        self.received = by_source.new_zeros(by_column) if "received" in statistics else None
        self.sink_rate = by_source.new_zeros(by_column) if "sink_rate" in statistics else None
        if self.sink_rate is not None:
            self.limits = outlier_limits(self.key.shape[-1]).to(call.query.device)

    def over_chunks(self) -> dict[str, Tensor]:
        """Add all chunks, and return the sums by name."""
        # Autocast would run the matrix products in half precision.
        with torch.autocast(self.call.query.device.type, enabled=False):
            for chunk in self.layout.chunks:
                self.add(chunk)
        keys = self.call.key.shape[2]
        sums = {"mass": self.mass, "entropy": self.entropy, "contribution": self.contribution}
        for name, values in (("received", self.received), ("sink_rate", self.sink_rate)):
            sums[name] = None if values is None else self.layout.to_keys(values, keys)
        return {name: values for name, values in sums.items() if values is not None}

    def add(self, chunk: QueryChunk) -> None:
        """Add the queries of one chunk."""
        call = self.call
        batch, heads, _, width = call.query.shape
        rows = chunk.rows[:, None, :, None].expand(-1, heads, -1, width)
        # Heads that share a key head are adjacent: fold them into the queries instead of repeating the keys.
        folded = (call.query.gather(2, rows).float() * call.scaling).view(batch, self.key.shape[1], -1, width)
        shape = (batch, heads, chunk.rows.shape[1])
        log_sum_exp = self.mass.new_full((*shape, self.mass.shape[-1]), HIDDEN_SCORE)
        source_entropy = None if self.entropy is None else torch.zeros_like(log_sum_exp)
        members = chunk.members.mT[:, None]
        shares = []
        for block in chunk.blocks:
            scores = self._scores(folded, block, shape)
            has_visible_key = block.has_visible_key[:, None]
            top, share = scores.amax(dim=-1), scores.softmax(dim=-1)
            block_log_sum_exp = top - share.amax(dim=-1).log()
            log_sum_exp[..., block.source] = torch.where(has_visible_key, block_log_sum_exp, HIDDEN_SCORE)
            if self.sink_rate is not None:
                stands_out = self._stands_out(scores, block).float()
                self.sink_rate[:, :, chunk.targets, block.first : block.stop] += members @ stands_out
            if source_entropy is not None:
                block_entropy = (block_log_sum_exp - scores.mul_(share).sum(dim=-1)).clamp_(min=0.0)
                source_entropy[..., block.source] = torch.where(has_visible_key, block_entropy, 0.0)
            shares.append(share)
        masses = self._masses(chunk, log_sum_exp)
        self.mass[:, :, chunk.targets] += members @ masses
        if self.entropy is not None and source_entropy is not None:
            self.entropy[:, :, chunk.targets] += members @ source_entropy
        for block, share in zip(chunk.blocks, shares, strict=True):
            mass = masses[..., block.source]
            if self.received is not None:
                weights = members * mass[..., None, :]
                self.received[:, :, chunk.targets, block.first : block.stop] += weights @ share
            if self.contribution is not None:
                norms = self._contribution_norms(chunk, block, share, mass)
                self.contribution[:, :, chunk.targets, block.source] += (members @ norms[..., None])[..., 0]

    def _scores(self, folded: Tensor, block: SourceBlock, shape: tuple[int, int, int]) -> Tensor:
        """Return the scores of a block; those of keys that a query cannot attend to are HIDDEN_SCORE."""
        scores = (folded @ self.key[..., block.first : block.stop]).view(*shape, -1)
        if self.call.softcap is not None:
            scores = scores.div_(self.call.softcap).tanh_().mul_(self.call.softcap)
        if block.clear < block.stop:
            tail = scores[..., block.clear - block.first :]
            if block.bias is not None:
                tail += block.bias[:, None]
            tail.masked_fill_(~block.visible[:, None], HIDDEN_SCORE)
        return scores

    def _masses(self, chunk: QueryChunk, log_sum_exp: Tensor) -> Float[Tensor, "batch heads rows sources"]:
        """Return the attention of each query to each source."""
        if self.layout.rest is not None and chunk.can_see_rest is not None:
            assert self.call.log_sum_exp is not None
            rows = chunk.rows[:, None].expand(-1, log_sum_exp.shape[1], -1)
            total = self.call.log_sum_exp.gather(2, rows).float()[..., None]
        else:
            total = log_sum_exp.logsumexp(dim=-1, keepdim=True)
        if self.call.sinks is not None:
            total = torch.logaddexp(total, self.call.sinks.float().view(1, -1, 1, 1))
        masses = (log_sum_exp - total).exp().masked_fill_(log_sum_exp == HIDDEN_SCORE, 0.0)
        if self.layout.rest is not None and chunk.can_see_rest is not None:
            rest = (1 - masses.sum(dim=-1)).clamp_(min=0.0)
            masses[..., self.layout.rest] = rest.masked_fill_(~chunk.can_see_rest[:, None], 0.0)
        return masses

    def _stands_out(self, scores: Tensor, block: SourceBlock) -> Tensor:
        """Return which keys get far more attention from a query than the median key of the block."""
        count = block.visible.sum(dim=-1) + (block.clear - block.first)
        if block.clear < block.stop:
            scores = scores.masked_fill(scores == HIDDEN_SCORE, torch.nan)
        middle, deviation = robust_location(scores)
        limit = (self.limits[count][:, None, :, None] * deviation).nan_to_num(nan=math.inf)
        return scores - middle >= limit.clamp_(min=math.log(SINK_ATTENTION_RATIO))

    def _contribution_norms(
        self, chunk: QueryChunk, block: SourceBlock, share: Tensor, mass: Tensor
    ) -> Float[Tensor, "batch heads rows"]:
        """Return the norm of what the block's keys add to the output, for each query and head."""
        assert self.value is not None
        assert self.call.output_gram is not None
        value = self.value[:, :, block.first : block.stop]
        batch, heads, rows = mass.shape
        added = (share.view(batch, value.shape[1], -1, share.shape[-1]) @ value).view(batch, heads, rows, -1)
        added = added * mass[..., None]
        if self.call.gate is not None:
            index = chunk.rows[:, None, :, None].expand_as(added)
            added = added * self.call.gate.gather(2, index).float()
        return ((added @ self.call.output_gram) * added).sum(dim=-1).clamp_(min=0.0).sqrt()
