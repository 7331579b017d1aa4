"""Which keys a query can see, for chosen queries and keys alone: no mask of all of them is made."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# What torch and transformers evaluate mask functions in, so that these may index with scalar tensors.
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True, eq=False)
class Visibility:
    """What an attention function lets through, from the mask and the arguments that it is given.

    Args:
        mask: `[batch or 1, 1, queries, keys]`, bool (True: visible) or added to the scores; `[batch, keys]` with 0 at
            padding, as flash attention takes it; a BlockMask; or None.
        offset: With no mask or a 2-D one, query i stands at key i + offset and sees the keys up to there, padding not
            counted. None: it sees all.
        window: With `offset`, how many keys it sees at most, its own with them.
    """

    mask: Tensor | BlockMask | None = None
    offset: int | None = None
    window: int | None = None

    @classmethod
    def of_call(
        cls,
        family: str,
        mask: Any,
        causal: bool,
        queries: int,
        keys: int,
        kwargs: Mapping[str, Any],
    ) -> Visibility:
        """From what transformers calls an attention function of `family` with.

        Raises ValueError for packed or paged sequences, and for a mask that the family does not read as it is meant.
        """
        if family == "flash":
            return cls._of_flash(mask, causal, queries, keys, kwargs)
        if isinstance(mask, BlockMask):
            return cls(mask)
        if mask is None:
            # Without a mask, eager and flex attention hide nothing, and sdpa neither from a single query. Sdpa aligns
            # queries and keys at their beginning.
            return cls(offset=0) if family == "sdpa" and causal and queries > 1 else cls()
        if mask.ndim != 4 or mask.shape[1] != 1:
            raise ValueError(
                f"cannot record under a mask of shape {list(mask.shape)}: [batch, 1, queries, keys] is needed"
            )
        if family != "sdpa" and mask.dtype == torch.bool:
            raise ValueError(
                f"{family} attention adds its mask to the scores, a bool one as 0 and 1: pass an additive mask"
            )
        return cls(mask)

    @classmethod
    def _of_flash(cls, mask: Any, causal: bool, queries: int, keys: int, kwargs: Mapping[str, Any]) -> Visibility:
        """Flash attention takes padding out and then aligns queries and keys at their end."""
        positions = kwargs.get("position_ids")
        packed = mask is None and positions is not None and len(positions) == 1 and (positions.diff() != 1).any()
        if packed or kwargs.get("cu_seq_lens_q") is not None:
            raise ValueError("several sequences packed into a row cannot be recorded: give each a row of its own")
        if mask is not None and mask.ndim != 2:
            raise ValueError(f"flash attention takes no mask of shape {list(mask.shape)}: [batch, keys] is needed")
        if mask is not None:
            keys = mask.shape[1]  # a static cache's empty slots are behind it
        return cls(mask, keys - queries, kwargs.get("sliding_window")) if causal else cls(mask, None)

    @property
    def key(self) -> Hashable | None:
        """Equal for equal visibilities while their masks live; None where a mask may change unseen."""
        if not isinstance(self.mask, Tensor):
            return id(self.mask), self.offset, self.window
        return None if self.mask.is_inference() else (id(self.mask), self.mask._version, self.offset, self.window)

    def __call__(
        self, rows: Int[Tensor, "batch rows"], columns: Int[Tensor, "batch columns"]
    ) -> tuple[Bool[Tensor, "batch rows columns"], Float[Tensor, "batch rows columns"] | None]:
        """Whether the query at each row sees the key at each column, and what the mask adds to the score."""
        row, column = rows[:, :, None], columns[:, None, :]
        batch = torch.arange(len(rows), device=rows.device)
        if isinstance(self.mask, BlockMask):
            return _evaluate(self.mask, batch, rows, columns), None
        if self.mask is not None and self.mask.ndim == 4:
            mask = self.mask.to(rows.device).expand(len(rows), -1, -1, -1)[batch[:, None, None], 0, row, column]
            if mask.dtype == torch.bool:
                return mask, None
            # Hidden keys carry the least number of the mask's type or -inf, no bias is anywhere near them.
            return mask > torch.finfo(mask.dtype).min / 2, mask.float()
        if self.mask is not None:
            return self._without_padding(self.mask.to(rows.device), rows, columns), None
        return self._between(row, column), None

    def _without_padding(
        self, mask: Tensor, rows: Int[Tensor, "batch rows"], columns: Int[Tensor, "batch columns"]
    ) -> Bool[Tensor, "batch rows columns"]:
        real = mask.bool()
        rank, last = real.cumsum(1) - 1, real.shape[1] - 1
        column = columns.clamp(max=last)
        seen = real.gather(1, column) & (columns <= last)
        if self.offset is None:
            return seen[:, None, :].expand(-1, rows.shape[1], -1)
        at = rows + self.offset
        # `_between` adds the offset; ranks count without padding on both sides.
        row = rank.gather(1, at) - self.offset
        visible = self._between(row[:, :, None], rank.gather(1, column)[:, None, :])
        return visible & seen[:, None, :] & real.gather(1, at)[:, :, None]

    def _between(self, row: Tensor, column: Tensor) -> Bool[Tensor, "batch rows columns"]:
        if self.offset is None:
            return torch.ones(torch.broadcast_shapes(row.shape, column.shape), dtype=torch.bool, device=row.device)
        visible = column <= row + self.offset
        return visible if self.window is None else visible & (column > row + self.offset - self.window)


def _evaluate(
    mask: BlockMask, batch: Tensor, rows: Int[Tensor, "batch rows"], columns: Int[Tensor, "batch columns"]
) -> Bool[Tensor, "batch rows columns"]:
    """A BlockMask's function at chosen places; like torch, one scalar index of each kind at a time under vmap."""
    head = batch.new_zeros(())
    by_column = torch.vmap(mask.mask_mod, in_dims=(None, None, None, 0))
    by_row = torch.vmap(by_column, in_dims=(None, None, 0, None))
    by_sample = torch.vmap(by_row, in_dims=(0, None, 0, 0))
    with TransformGetItemToIndex():
        return by_sample(batch, head, rows, columns)
