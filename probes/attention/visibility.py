"""Which keys a query can attend to, for chosen queries and keys only: no mask of all of them is built."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# torch and transformers evaluate mask functions inside it, so that these functions may index with scalar tensors.
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True, eq=False)
class Visibility:
    """Keys that an attention function lets each query attend to, according to the mask and arguments of its call.

    Args:
        mask: `[batch or 1, 1, queries, keys]`, bool (True: visible) or added to the scores; `[batch, keys]` with 0 at
            padding, as flash attention takes it; a BlockMask; or None.
        offset: Used without a mask or with a 2-D one. Query i is at key i + offset and can attend to the keys up to
            there, padding not counted. None: it can attend to all keys.
        window: Used with `offset`. The number of keys that a query can attend to at most, including its own.
    """

    mask: Tensor | BlockMask | None = None
    offset: int | None = None
    window: int | None = None

    @classmethod
    def from_call(
        cls,
        mask_format: str,
        mask: Any,
        causal: bool,
        queries: int,
        keys: int,
        kwargs: Mapping[str, Any],
    ) -> Visibility:
        """Return the visibility in one call of an attention function by transformers.

        Args:
            mask_format: The masks that the function takes: "sdpa", "eager", "flash" or "flex".
            mask: The mask of the call, in that format, or None.
            causal: Whether the function is causal without a mask.
            queries: Number of queries.
            keys: Number of keys.
            kwargs: Other keyword arguments of the call.

        Raises:
            ValueError: Packed or paged sequences, or a mask that the function does not read as it is meant.
        """
        if mask_format == "flash":
            return cls._from_flash_call(mask, causal, queries, keys, kwargs)
        if isinstance(mask, BlockMask):
            return cls(mask)
        if mask is None:
            # Without a mask, eager and flex attention hide nothing, and sdpa hides nothing from a single query. Sdpa
            # aligns queries and keys at their beginning.
            return cls(offset=0) if mask_format == "sdpa" and causal and queries > 1 else cls()
        if mask.ndim != 4 or mask.shape[1] != 1:
            raise ValueError(
                f"cannot record under a mask of shape {list(mask.shape)}: pass one of shape [batch, 1, queries, keys]"
            )
        if mask_format != "sdpa" and mask.dtype == torch.bool:
            raise ValueError(
                f"{mask_format} attention adds its mask to the scores, a bool one as 0 and 1: pass an additive mask"
            )
        return cls(mask)

    @classmethod
    def _from_flash_call(
        cls, mask: Any, causal: bool, queries: int, keys: int, kwargs: Mapping[str, Any]
    ) -> Visibility:
        """Return the visibility under flash attention.

        It removes padding, then aligns queries and keys at their end.
        """
        positions = kwargs.get("position_ids")
        packed = mask is None and positions is not None and len(positions) == 1 and (positions.diff() != 1).any()
        if packed or kwargs.get("cu_seq_lens_q") is not None:
            raise ValueError("several sequences packed into a row cannot be recorded: pass each as a row of its own")
        if mask is not None and mask.ndim != 2:
            raise ValueError(
                f"flash attention takes no mask of shape {list(mask.shape)}: pass one of shape [batch, keys]"
            )
        if mask is not None:
            keys = mask.shape[1]  # the empty slots of a static cache are behind it
        return cls(mask, keys - queries, kwargs.get("sliding_window")) if causal else cls(mask, None)

    @property
    def cache_key(self) -> Hashable | None:
        """Return a key that is equal for equal visibilities while their masks live.

        It is None if the mask may change without notice.
        """
        if not isinstance(self.mask, Tensor):
            return id(self.mask), self.offset, self.window
        return None if self.mask.is_inference() else (id(self.mask), self.mask._version, self.offset, self.window)

    def __call__(
        self, rows: Int[Tensor, "batch rows"], columns: Int[Tensor, "batch columns"]
    ) -> tuple[Bool[Tensor, "batch rows columns"], Float[Tensor, "batch rows columns"] | None]:
        """Return which keys some queries can attend to.

        Args:
            rows: Indices of queries.
            columns: Indices of keys.

        Returns:
            Whether the query at each row can attend to the key at each column, and what the mask adds to the score;
            None if it adds nothing.
        """
        row, column = rows[:, :, None], columns[:, None, :]
        batch = torch.arange(len(rows), device=rows.device)
        if isinstance(self.mask, BlockMask):
            return _evaluate_block_mask(self.mask, batch, rows, columns), None
        if self.mask is not None and self.mask.ndim == 4:
            mask = self.mask.to(rows.device).expand(len(rows), -1, -1, -1)[batch[:, None, None], 0, row, column]
            if mask.dtype == torch.bool:
                return mask, None
            # Hidden keys have the minimum of the mask's type or -inf. No bias is near these values.
            return mask > torch.finfo(mask.dtype).min / 2, mask.float()
        if self.mask is not None:
            return self._within_padding_mask(self.mask.to(rows.device), rows, columns), None
        return self._within_window(row, column), None

    def _within_padding_mask(
        self, mask: Tensor, rows: Int[Tensor, "batch rows"], columns: Int[Tensor, "batch columns"]
    ) -> Bool[Tensor, "batch rows columns"]:
        """Return the visibility under a 2-D mask: positions are counted without padding."""
        is_token = mask.bool()
        rank, last = is_token.cumsum(1) - 1, is_token.shape[1] - 1
        column = columns.clamp(max=last)
        is_token_column = is_token.gather(1, column) & (columns <= last)
        if self.offset is None:
            return is_token_column[:, None, :].expand(-1, rows.shape[1], -1)
        query_position = rows + self.offset
        # `_within_window` adds the offset; ranks count without padding on both sides.
        row = rank.gather(1, query_position) - self.offset
        visible = self._within_window(row[:, :, None], rank.gather(1, column)[:, None, :])
        return visible & is_token_column[:, None, :] & is_token.gather(1, query_position)[:, :, None]

    def _within_window(self, row: Tensor, column: Tensor) -> Bool[Tensor, "batch rows columns"]:
        """Return the visibility by `offset` and `window` only."""
        if self.offset is None:
            return torch.ones(torch.broadcast_shapes(row.shape, column.shape), dtype=torch.bool, device=row.device)
        visible = column <= row + self.offset
        return visible if self.window is None else visible & (column > row + self.offset - self.window)


def _evaluate_block_mask(
    mask: BlockMask, batch: Tensor, rows: Int[Tensor, "batch rows"], columns: Int[Tensor, "batch columns"]
) -> Bool[Tensor, "batch rows columns"]:
    """Evaluate a BlockMask's function at chosen rows and columns.

    Like torch, it passes one scalar index of each axis at a time, under vmap.
    """
    head = batch.new_zeros(())
    by_column = torch.vmap(mask.mask_mod, in_dims=(None, None, None, 0))
    by_row = torch.vmap(by_column, in_dims=(None, None, 0, None))
    by_sample = torch.vmap(by_row, in_dims=(0, None, 0, 0))
    with TransformGetItemToIndex():
        return by_sample(batch, head, rows, columns)
