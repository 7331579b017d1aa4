"""Attention statistics by token group, streamed over chunks of queries."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# Attention scores a chunk may hold (4 MiB in float32, for the cache); it has as many queries as fit, at least one.
SCORES_PER_CHUNK = 2**20


@dataclass(frozen=True)
class Layout:
    """Which queries and keys of a call count, gathered so that each source is one block of columns.

    Rows and columns that only fill up a shorter sample belong to no target (`members` 0) or are not `filled`.
    """

    rows: Int[Tensor, "batch rows"]
    members: Float[Tensor, "batch rows targets"]
    columns: Int[Tensor, "batch columns"]
    filled: Bool[Tensor, "batch columns"]
    widths: tuple[int, ...]

    @classmethod
    def build(
        cls,
        queries: Int[Tensor, "batch queries"],
        keys: Int[Tensor, "batch keys"],
        targets: tuple[int, ...],
        sources: tuple[int, ...],
    ) -> Layout:
        """From the group of each query and each key, and the groups of the two statistics axes."""
        member = torch.stack([queries == target for target in targets], dim=-1)
        rows, _ = _gather_order(member.any(dim=-1))
        members = member.gather(1, rows[..., None].expand(-1, -1, len(targets)))
        blocks = [_gather_order(keys == source) for source in sources]
        columns, filled = (torch.cat(parts, dim=1) for parts in zip(*blocks, strict=True))
        return cls(rows, members.float(), columns, filled, tuple(block.shape[1] for block, _ in blocks))


def _gather_order(
    member: Bool[Tensor, "batch positions"],
) -> tuple[Int[Tensor, "batch width"], Bool[Tensor, "batch width"]]:
    """Indices of each sample's members, filled up to the longest sample's count, and which are no filling."""
    order = member.long().argsort(dim=1, descending=True, stable=True)[:, : int(member.sum(dim=1).max())]
    return order, member.gather(1, order)


@dataclass(frozen=True)
class Sums:
    """Sums over the queries of each target, in float32; divide by the counts for means."""

    mass: Float[Tensor, "batch heads targets sources"]
    entropy: Float[Tensor, "batch heads targets sources"]
    queries: Float[Tensor, "batch targets sources"]
    received: Float[Tensor, "batch heads targets positions"]
    receivers: Float[Tensor, "batch targets positions"]

    def __add__(self, other: Sums) -> Sums:
        """Of two calls; the positions of the shorter one are filled up with zeros."""
        pairs = {field.name: (getattr(self, field.name), getattr(other, field.name)) for field in fields(self)}
        return Sums(**{name: _pad_to(a, b.shape[-1]) + _pad_to(b, a.shape[-1]) for name, (a, b) in pairs.items()})


def _pad_to(values: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, max(width - values.shape[-1], 0)))


@torch.no_grad()
def group_statistics(
    query: Float[Tensor, "batch heads queries width"],
    key: Float[Tensor, "batch kv_heads keys width"],
    mask: Tensor | None,
    causal: bool,
    scaling: float,
    layout: Layout,
) -> Sums:
    """Sums of attention mass, entropy and received attention of one layer's call.

    Args:
        query: After rotary embedding.
        key: The same, with the cached ones, not repeated for grouped queries.
        mask: `[batch or 1, 1, queries, keys]`; bool (True: visible) or added to the scores. It is authoritative.
        causal: Without a mask, whether query i sees the keys up to i alone (sdpa's upper-left alignment) or all.
        scaling: Factor of the scores.
        layout: Whose attention to sum, and over which keys.

    A query that sees no key of a source adds nothing to that source's sums and counts.
    """
    batch, heads, _, width = query.shape
    kv_heads, sample = key.shape[1], torch.arange(batch, device=query.device)[:, None, None]
    columns, targets = layout.columns, layout.members.shape[-1]
    chunk = max(SCORES_PER_CHUNK // (batch * heads * max(columns.shape[1], 1)), 1)
    keys = key.gather(2, columns[:, None, :, None].expand(-1, kv_heads, -1, width)).float().transpose(2, 3)

    mass = query.new_zeros(batch, heads, targets, len(layout.widths), dtype=torch.float32)
    entropy, queries = torch.zeros_like(mass), torch.zeros_like(mass[:, 0])
    received = query.new_zeros(batch, heads, targets, columns.shape[1], dtype=torch.float32)
    receivers = torch.zeros_like(received[:, 0])
    # Autocast would run the matrix products below in half precision.
    with torch.autocast(query.device.type, enabled=False):
        for rows, members in zip(layout.rows.split(chunk, dim=1), layout.members.split(chunk, dim=1), strict=True):
            chunk_query = query.gather(2, rows[:, None, :, None].expand(-1, heads, -1, width)).float() * scaling
            # The heads that share a key head lie side by side: fold them into its queries instead of repeating keys.
            scores = (chunk_query.reshape(batch, kv_heads, -1, width) @ keys).view(batch, heads, -1, columns.shape[1])
            visible = layout.filled[:, None, :].expand(-1, rows.shape[1], -1)
            if mask is not None:
                bias = mask.expand(batch, -1, -1, -1)[sample, 0, rows[:, :, None], columns[:, None, :]]
                if bias.dtype == torch.bool:
                    visible = visible & bias
                else:
                    # Hidden keys carry the least number of the mask's type or -inf, no bias is anywhere near them.
                    visible = visible & (bias > torch.finfo(bias.dtype).min / 2)
                    scores = scores + bias[:, None].float()
            elif causal:
                visible = visible & (columns[:, None, :] <= rows[:, :, None])
            hidden = ~visible[:, None]
            scores = scores.masked_fill(hidden, -torch.inf)
            # A query that sees nothing has NaN here, and every key of its is hidden.
            attention = scores.softmax(dim=-1).masked_fill(hidden, 0.0)

            masses, entropies, seen = [], [], []
            blocks = (tensor.split(layout.widths, dim=-1) for tensor in (scores, attention, visible))
            for block_scores, block_attention, block_visible in zip(*blocks, strict=True):
                sees = block_visible.any(dim=-1)
                inner = torch.special.entr(block_scores.softmax(dim=-1)).sum(dim=-1)
                entropies.append(torch.where(sees[:, None], inner, 0.0))
                masses.append(block_attention.sum(dim=-1))
                seen.append(sees.float())
            mass += torch.einsum("bqt,bhqs->bhts", members, torch.stack(masses, dim=-1))
            entropy += torch.einsum("bqt,bhqs->bhts", members, torch.stack(entropies, dim=-1))
            queries += torch.einsum("bqt,bqs->bts", members, torch.stack(seen, dim=-1))
            received += torch.einsum("bqt,bhqk->bhtk", members, attention)
            receivers += torch.einsum("bqt,bqk->btk", members, visible.float())

    # Back from blocks of columns to the order of the keys; filling adds its zeros to some key.
    def scatter(values: Tensor) -> Tensor:
        places = columns.view(batch, *[1] * (values.ndim - 2), -1).expand_as(values)
        return values.new_zeros(*values.shape[:-1], key.shape[2]).scatter_add_(-1, places, values)

    return Sums(mass, entropy, queries, scatter(received), scatter(receivers))
