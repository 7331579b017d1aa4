"""Layout of one attention call: its queries in chunks, and its keys in blocks of one source group each."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# Attention scores in one chunk. On the CPU they should stay in the cache (4 MiB in float32). On an accelerator they
# should keep it busy. A chunk has as many queries as fit, at least one.
SCORES_PER_CHUNK = 2**20
SCORES_PER_CHUNK_ON_ACCELERATOR = 2**24
# Visibility in one chunk whose widest source is not computed (4 MiB as bool).
VISIBILITY_PER_CHUNK = 2**22
# If all heads do not fit with this many queries, take fewer heads at a time: matrix products of a few rows are slow.
QUERIES_PER_CHUNK = 96

# For rows and columns of each sample: which keys each query can attend to, and what is added to the scores.
VisibilityFunction = Callable[[Int[Tensor, "batch rows"], Int[Tensor, "batch columns"]], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class SourceBlock:
    """The keys of one source that a chunk of queries can attend to: columns `first` to `stop` of the layout.

    Attributes:
        source: Index of the source.
        first: First column.
        clear: All queries can attend to all keys before this column, and nothing is added to their scores.
        stop: Column after the last.
        visible: Which keys each query can attend to, from column `clear` on.
        bias: What is added to the scores from column `clear` on; None for nothing.
        has_visible_key: Which queries can attend to at least one of the keys.
    """

    source: int
    first: int
    clear: int
    stop: int
    visible: Bool[Tensor, "batch rows columns"]
    bias: Float[Tensor, "batch rows columns"] | None
    has_visible_key: Bool[Tensor, "batch rows"]


@dataclass(frozen=True)
class QueryChunk:
    """Some queries of a call.

    Attributes:
        rows: Index of each query in the call.
        targets: Indices of the targets that some of these queries belong to.
        members: 1 for the targets of each query, else 0. Filler rows of a shorter sample belong to no target.
        blocks: The keys that the queries can attend to, by source, without those of the rest.
        can_see_rest: Which queries can attend to the source that gets the rest of the mass; None if there is none.
    """

    rows: Int[Tensor, "batch rows"]
    targets: list[int]
    members: Float[Tensor, "batch rows targets"]
    blocks: list[SourceBlock]
    can_see_rest: Bool[Tensor, "batch rows"] | None


@dataclass(frozen=True)
class GroupLayout:
    """Which queries and keys of a call count. The keys are gathered so that each source is one block of columns.

    It holds everything that does not depend on scores, since layers share it.

    Attributes:
        columns: The key at each column; None if the keys are in this order already.
        heads: Number of query heads to compute at a time, including all that share a key head.
        chunks: The queries of the targets.
        queries: Number of queries of each target that can attend to each source.
        receivers: Number of queries of each target that can attend to each key.
        is_key: 1 for a key of some group, 0 for filler and empty cache slots.
        rest: Index of the widest source, if its mass is what the other sources leave; else None.
    """

    columns: Int[Tensor, "batch columns"] | None
    heads: int
    chunks: list[QueryChunk]
    queries: Float[Tensor, "batch targets sources"]
    receivers: Float[Tensor, "batch targets positions"]
    is_key: Float[Tensor, "batch keys"]
    rest: int | None

    @classmethod
    def build(
        cls,
        queries: Int[Tensor, "batch queries"],
        keys: Int[Tensor, "batch keys"],
        targets: tuple[int, ...],
        sources: tuple[int, ...],
        visible: VisibilityFunction,
        heads: int,
        key_heads: int,
        with_rest: bool = False,
    ) -> GroupLayout:
        """Build the layout of one call.

        Args:
            queries: Group of each query.
            keys: Group of each key; -1 for a key of no group.
            targets: Groups on the target axis of the statistics.
            sources: Groups on the source axis of the statistics.
            visible: Which keys each query can attend to, and what is added to the scores.
            heads: Number of query heads.
            key_heads: Number of key heads.
            with_rest: Leave the scores of the widest source out, since the sum over all sources is known.

        Returns:
            The layout, which every layer with the same groups and the same mask can use.

        Raises:
            ValueError: A query can attend to a key of no source, that is, to an empty slot of a static cache.
        """
        member = torch.stack([queries == target for target in targets], dim=-1)
        rows, _ = _gather_order(member.any(dim=-1))
        members = member.gather(1, rows[..., None].expand(-1, -1, len(targets))).float()
        orders = [_gather_order(keys == source) for source in sources]
        columns, is_key = (torch.cat(parts, dim=1) for parts in zip(*orders, strict=True))
        edges = [0, *torch.tensor([order.shape[1] for order, _ in orders]).cumsum(0).tolist()]
        stray, is_stray = _gather_order((keys[..., None] != keys.new_tensor(sources)).all(dim=-1))
        widths = [stop - first for first, stop in itertools.pairwise(edges)]
        rest = widths.index(max(widths)) if with_rest else None
        computed = columns.shape[1] - (0 if rest is None else widths[rest])
        heads_per_call, queries_per_chunk = _chunk_sizes(
            queries.device, len(queries) * max(computed, 1), rows.shape[1], heads, heads // key_heads
        )
        if rest is not None:
            queries_per_chunk = min(queries_per_chunk, max(VISIBILITY_PER_CHUNK // max(columns.numel(), 1), 1))

        counts = members.new_zeros(len(queries), len(targets), len(sources))
        receivers = members.new_zeros(len(queries), len(targets), columns.shape[1])
        chunks = []
        for chunk_rows, chunk_members in zip(
            rows.split(queries_per_chunk, dim=1), members.split(queries_per_chunk, dim=1), strict=True
        ):
            present = chunk_members.any(dim=(0, 1)).nonzero().flatten().tolist()
            if not present:
                continue
            if (
                stray.shape[1]
                and (visible(chunk_rows, stray)[0] & is_stray[:, None] & chunk_members.any(-1)[..., None]).any()
            ):
                raise ValueError("the model attends to empty slots of its cache: flex attention needs a dynamic one")
            chunk_visible, bias = visible(chunk_rows, columns)
            chunk_visible = chunk_visible & is_key[:, None, :]
            blocks = [
                block
                for source, (first, stop) in enumerate(itertools.pairwise(edges))
                if source != rest
                and (block := _build_source_block(source, first, stop, chunk_visible, bias)) is not None
            ]
            for block in blocks:
                counts[..., block.source] += (chunk_members * block.has_visible_key[..., None]).sum(dim=1)
            can_see_rest = None
            if rest is not None:
                can_see_rest = chunk_visible[..., edges[rest] : edges[rest + 1]].any(dim=-1)
                counts[..., rest] += (chunk_members * can_see_rest[..., None]).sum(dim=1)
            receivers += chunk_members.mT @ chunk_visible.float()
            chunks.append(QueryChunk(chunk_rows, present, chunk_members[..., present], blocks, can_see_rest))
        in_order = torch.equal(columns, torch.arange(keys.shape[1], device=keys.device).expand_as(keys))
        is_token = (keys >= 0).float()
        layout = cls(None if in_order else columns, heads_per_call, chunks, counts, receivers, is_token, rest)
        return replace(layout, receivers=layout.to_keys(receivers, keys.shape[1]))

    def to_keys(self, values: Float[Tensor, "batch ... columns"], keys: int) -> Float[Tensor, "batch ... keys"]:
        """Reorder `values` from the layout's columns to the call's keys.

        Args:
            values: Values by column. Filler columns must be 0, since they are added to some key.
            keys: Number of keys of the call.

        Returns:
            Values by key.
        """
        if self.columns is None:
            return values
        index = self.columns.view(len(values), *[1] * (values.ndim - 2), -1).expand_as(values)
        return values.new_zeros(*values.shape[:-1], keys).scatter_add_(-1, index, values)


def _chunk_sizes(
    device: torch.device, scores_per_query: int, queries: int, heads: int, heads_per_key: int
) -> tuple[int, int]:
    """Return the number of heads to compute at a time, and the number of queries of a chunk."""
    scores = SCORES_PER_CHUNK if device.type == "cpu" else SCORES_PER_CHUNK_ON_ACCELERATOR
    one_head_queries = max(scores // scores_per_query, 1)
    most_heads = max(one_head_queries // max(min(QUERIES_PER_CHUNK, queries), 1), 1)
    heads_per_call = min(max(most_heads // heads_per_key, 1) * heads_per_key, heads)
    return heads_per_call, max(one_head_queries // heads_per_call, 1)


def _gather_order(
    member: Bool[Tensor, "batch positions"],
) -> tuple[Int[Tensor, "batch width"], Bool[Tensor, "batch width"]]:
    """Return the indices of each sample's members, filled up to the longest sample, and which of them are no filler."""
    order = member.long().argsort(dim=1, descending=True, stable=True)[:, : int(member.sum(dim=1).max())]
    return order, member.gather(1, order)


def _build_source_block(source: int, first: int, stop: int, visible: Tensor, bias: Tensor | None) -> SourceBlock | None:
    """Return the columns from the first to the last that any row can attend to; None if there are none."""
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
    return SourceBlock(
        source,
        start,
        start + clear,
        stop,
        visible[..., clear:].clone(),  # a view would keep the visibility of all columns in memory
        None if bias is None else bias[..., clear:].clone(),
        visible.any(dim=-1),
    )
