"""Attention statistics by token group, streamed over chunks of queries.

Within one source, the scores s of a query give the share of each key p = softmax(s), the log-sum-exp
L = max s - ln max p, and the entropy H = -sum p ln p = L - sum p s. The source's mass is exp(L) over the sum of exp(L)
of all sources. So each score is computed once and no logarithm is taken of it, and attention that is too little for
float32 still has its entropy.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# Attention scores a chunk may hold, so that they stay in the cache (4 MiB in float32); on an accelerator, so that they
# keep it busy. A chunk has as many queries as fit, at least one.
SCORES_PER_CHUNK = 2**20
SCORES_PER_CHUNK_ON_ACCELERATOR = 2**24
# Where not all heads fit with this many queries, fewer heads at a time: matrix products of a few rows are slow.
ROWS_PER_CHUNK = 96

HIDDEN = torch.finfo(torch.float32).min / 2

# For rows and columns of each sample: which are visible to which, and what is added to the scores.
Visible = Callable[[Int[Tensor, "batch rows"], Int[Tensor, "batch columns"]], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Block:
    """The keys of one source that a chunk of queries can see: columns `first` to `stop` of the layout.

    All queries see all keys before column `clear`; `visible` and `bias` are of the columns from there on.
    """

    source: int
    first: int
    clear: int
    stop: int
    visible: Bool[Tensor, "batch rows columns"]
    bias: Float[Tensor, "batch rows columns"] | None
    sees: Bool[Tensor, "batch rows"]


@dataclass(frozen=True)
class Chunk:
    """Some queries of a call. Rows that only fill up a shorter sample belong to no target (`members` 0)."""

    rows: Int[Tensor, "batch rows"]
    targets: list[int]
    members: Float[Tensor, "batch rows targets"]
    blocks: list[Block]


@dataclass(frozen=True)
class Layout:
    """Which queries and keys of a call count, the keys gathered so that each source is one block of columns.

    All that does not depend on scores is here, as layers share it.

    Attributes:
        columns: The key at each column; None where keys are in this order as they come.
        heads: How many query heads to take at a time, all that share a key head among them.
        queries: How many queries of each target see each source.
        receivers: How many queries of each target see each key.
    """

    columns: Int[Tensor, "batch columns"] | None
    heads: int
    chunks: list[Chunk]
    queries: Float[Tensor, "batch targets sources"]
    receivers: Float[Tensor, "batch targets positions"]

    @classmethod
    def build(
        cls,
        queries: Int[Tensor, "batch queries"],
        keys: Int[Tensor, "batch keys"],
        targets: tuple[int, ...],
        sources: tuple[int, ...],
        visible: Visible,
        heads: int,
        key_heads: int,
    ) -> Layout:
        """From the group of each query and each key, the groups of the two statistics axes, what is visible, and how
        many heads queries and keys have.

        Raises ValueError where a query sees a key of no source: an empty slot of a static cache.
        """
        member = torch.stack([queries == target for target in targets], dim=-1)
        rows, _ = _gather_order(member.any(dim=-1))
        members = member.gather(1, rows[..., None].expand(-1, -1, len(targets))).float()
        orders = [_gather_order(keys == source) for source in sources]
        columns, filled = (torch.cat(parts, dim=1) for parts in zip(*orders, strict=True))
        edges = [0, *torch.tensor([order.shape[1] for order, _ in orders]).cumsum(0).tolist()]
        stray, is_stray = _gather_order((keys[..., None] != keys.new_tensor(sources)).all(dim=-1))
        scores = SCORES_PER_CHUNK if queries.device.type == "cpu" else SCORES_PER_CHUNK_ON_ACCELERATOR
        fit = max(scores // (len(queries) * max(columns.shape[1], 1)), 1)  # queries of one head
        most, shared = max(fit // max(min(ROWS_PER_CHUNK, rows.shape[1]), 1), 1), heads // key_heads
        together = min(max(most // shared, 1) * shared, heads)
        size = max(fit // together, 1)

        counts = members.new_zeros(len(queries), len(targets), len(sources))
        receivers = members.new_zeros(len(queries), len(targets), columns.shape[1])
        chunks = []
        for chunk_rows, chunk_members in zip(rows.split(size, dim=1), members.split(size, dim=1), strict=True):
            present = chunk_members.any(dim=(0, 1)).nonzero().flatten().tolist()
            if not present:
                continue
            if (
                stray.shape[1]
                and (visible(chunk_rows, stray)[0] & is_stray[:, None] & chunk_members.any(-1)[..., None]).any()
            ):
                raise ValueError("the model attends to empty slots of its cache: flex attention needs a dynamic one")
            seen, bias = visible(chunk_rows, columns)
            seen = seen & filled[:, None, :]
            blocks = [
                block
                for source, (first, stop) in enumerate(itertools.pairwise(edges))
                if (block := _block(source, first, stop, seen, bias)) is not None
            ]
            for block in blocks:
                counts[..., block.source] += (chunk_members * block.sees[..., None]).sum(dim=1)
            receivers += chunk_members.mT @ seen.float()
            chunks.append(Chunk(chunk_rows, present, chunk_members[..., present], blocks))
        in_order = torch.equal(columns, torch.arange(keys.shape[1], device=keys.device).expand_as(keys))
        layout = cls(None if in_order else columns, together, chunks, counts, receivers)
        return replace(layout, receivers=layout.to_keys(receivers, keys.shape[1]))

    def to_keys(self, values: Float[Tensor, "batch ... columns"], keys: int) -> Float[Tensor, "batch ... keys"]:
        """From the layout's columns to the order of the keys; a column that is filling adds its zeros to some key."""
        if self.columns is None:
            return values
        places = self.columns.view(len(values), *[1] * (values.ndim - 2), -1).expand_as(values)
        return values.new_zeros(*values.shape[:-1], keys).scatter_add_(-1, places, values)


def _gather_order(
    member: Bool[Tensor, "batch positions"],
) -> tuple[Int[Tensor, "batch width"], Bool[Tensor, "batch width"]]:
    """Indices of each sample's members, filled up to the longest sample's count, and which are no filling."""
    order = member.long().argsort(dim=1, descending=True, stable=True)[:, : int(member.sum(dim=1).max())]
    return order, member.gather(1, order)


def _block(source: int, first: int, stop: int, visible: Tensor, bias: Tensor | None) -> Block | None:
    """The columns from the first to the last that any row sees, if any."""
    visible = visible[..., first:stop]
    used = visible.any(dim=1).any(dim=0).nonzero()
    if not len(used):
        return None
    start, stop = first + int(used[0]), first + int(used[-1]) + 1
    visible = visible[..., start - first : stop - first]
    partial = ~visible.all(dim=1).all(dim=0)
    if bias is not None:
        bias = bias[..., start:stop]
        partial = partial | (bias != 0).any(dim=1).any(dim=0)
    clear = int(partial.nonzero()[0]) if partial.any() else stop - start
    return Block(
        source,
        start,
        start + clear,
        stop,
        visible[..., clear:].clone(),  # a view would keep the visibility of all columns
        None if bias is None else bias[..., clear:].clone(),
        visible.any(dim=-1),
    )


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
        return Sums(*(a + b for a, b in self._alike(other)))

    def beside(self, other: Sums) -> Sums:
        """Of two calls with different samples, `other`'s after these."""
        return Sums(*(torch.cat(pair) for pair in self._alike(other)))

    def moved(self, first: int, stop: int) -> Sums:
        """From keys to positions: a sliding cache starts late, at position `first`; a static one ends in empty slots."""
        pad = torch.nn.functional.pad
        received, receivers = (pad(values, (first, 0))[..., :stop] for values in (self.received, self.receivers))
        return replace(self, received=received, receivers=receivers)

    def spread(self, positions: Int[Tensor, "batch keys"], stop: int) -> Sums:
        """From keys to the positions they are of, where some were dropped; what only fills up adds its zeros to 0."""

        def place(values: Tensor) -> Tensor:
            index = positions.view(len(values), *[1] * (values.ndim - 2), -1).expand_as(values)
            return values.new_zeros(*values.shape[:-1], stop).scatter_add_(-1, index, values)

        return replace(self, received=place(self.received), receivers=place(self.receivers))

    def _alike(self, other: Sums) -> list[tuple[Tensor, Tensor]]:
        pairs = [(getattr(self, field.name), getattr(other, field.name)) for field in fields(self)]
        return [(_pad_to(a, b.shape[-1]), _pad_to(b, a.shape[-1])) for a, b in pairs]


def _pad_to(values: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, max(width - values.shape[-1], 0)))


@torch.no_grad()
def group_statistics(
    query: Float[Tensor, "batch heads queries width"],
    key: Float[Tensor, "batch kv_heads keys width"],
    scaling: float,
    layout: Layout,
    softcap: float | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
) -> Sums:
    """Sums of attention mass, entropy and received attention of one layer's call.

    Args:
        query: After rotary embedding.
        key: The same, with the cached ones, not repeated for grouped queries.
        scaling: Factor of the scores.
        layout: Whose attention to sum, over which keys.
        softcap: Scores go through softcap * tanh(score / softcap), as in Gemma 2.
        sinks: A score for each head that takes attention and has no key, as in gpt-oss: masses sum to less than 1.

    A query that sees no key of a source adds nothing to that source's sums and counts.
    """
    group = query.shape[1] // key.shape[1]
    at_once = layout.heads // group  # of the keys
    parts = [
        _of_heads(
            query[:, first * group : (first + at_once) * group],
            key[:, first : first + at_once],
            scaling,
            layout,
            softcap,
            None if sinks is None else sinks[first * group : (first + at_once) * group],
        )
        for first in range(0, key.shape[1], at_once)
    ]
    mass, entropy, received = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    return Sums(mass, entropy, layout.queries, received, layout.receivers)


def _of_heads(
    query: Float[Tensor, "batch heads queries width"],
    key: Float[Tensor, "batch kv_heads keys width"],
    scaling: float,
    layout: Layout,
    softcap: float | None,
    sinks: Float[Tensor, " heads"] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mass, entropy and received attention of some heads, as `group_statistics` sums them."""
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
            # The heads that share a key head lie side by side: fold them into its queries instead of repeating keys.
            folded = (query.gather(2, rows).float() * scaling).view(batch, kv_heads, -1, width)
            level = mass.new_full((batch, heads, chunk.rows.shape[1], sources), HIDDEN)
            inner = torch.zeros_like(level)
            shares = []
            for block in chunk.blocks:
                scores = (folded @ key[..., block.first : block.stop]).view(batch, heads, chunk.rows.shape[1], -1)
                if softcap is not None:
                    scores = scores.div_(softcap).tanh_().mul_(softcap)
                if block.clear < block.stop:
                    tail = scores[..., block.clear - block.first :]
                    if block.bias is not None:
                        tail += block.bias[:, None]
                    tail.masked_fill_(~block.visible[:, None], HIDDEN)
                top, share = scores.amax(dim=-1), scores.softmax(dim=-1)
                sum_exp = top - share.amax(dim=-1).log()
                sees = block.sees[:, None]
                level[..., block.source] = torch.where(sees, sum_exp, HIDDEN)
                spread = (sum_exp - scores.mul_(share).sum(dim=-1)).clamp_(min=0.0)
                inner[..., block.source] = torch.where(sees, spread, 0.0)
                shares.append(share)
            whole = level.logsumexp(dim=-1, keepdim=True)
            if sinks is not None:
                whole = torch.logaddexp(whole, sinks.float().view(1, -1, 1, 1))
            masses = (level - whole).exp().masked_fill_(level == HIDDEN, 0.0)
            members = chunk.members.mT[:, None]
            mass[:, :, chunk.targets] += members @ masses
            entropy[:, :, chunk.targets] += members @ inner
            for block, share in zip(chunk.blocks, shares, strict=True):
                weights = members * masses[..., None, :, block.source]
                received[:, :, chunk.targets, block.first : block.stop] += weights @ share
    return mass, entropy, layout.to_keys(received, keys)
