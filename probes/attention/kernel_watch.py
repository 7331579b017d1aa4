"""Looks at the attention weights of chosen queries, as the kernel that makes the output has them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Attention scores held at once (16 MiB in float32).
SCORES_PER_CHUNK = 2**22

Receive = Callable[[Int[Tensor, " rows"], Float[Tensor, "batch heads rows keys"]], None]


class KernelWatch:
    """Hooks a layer's attention and hands out weights of chosen queries, a few at a time.

    Under eager attention these are the module's own weights; under sdpa they are computed once more, in float32, from
    the very arguments of the kernel's call. Composes with `record_attention`, which computes with a kernel of its own.

    Args:
        attention: A decoder layer's `self_attn`.
        wanted: Asked before each call: which queries to look at; None for a call to leave alone.
        receive: Gets the indices of some of these queries, and their weights.
    """

    def __init__(
        self, attention: nn.Module, wanted: Callable[[], Bool[Tensor, " queries"] | None], receive: Receive
    ) -> None:
        self.attention, self.wanted, self.receive = attention, wanted, receive
        self._mode: _Mode | None = None

    def install(self, stack: ExitStack) -> None:
        """Until `stack` closes."""
        stack.callback(self.attention.register_forward_pre_hook(self._begin).remove)
        # Always, since the mode must not outlive a call that raises.
        stack.callback(self.attention.register_forward_hook(self._end, always_call=True).remove)

    def _begin(self, attention: nn.Module, args: tuple[Any, ...]) -> None:
        wanted = self.wanted()
        if wanted is not None:
            self._mode = _Mode(wanted, self.receive)
            self._mode.__enter__()

    def _end(self, attention: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        mode, self._mode = self._mode, None
        if mode is None:
            return
        mode.__exit__(None, None, None)
        if isinstance(output, tuple) and output[1] is not None:
            rows = mode.rows.to(output[1].device)
            self.receive(rows, output[1].detach()[:, :, rows].float())


class _Mode(TorchFunctionMode):
    """Sees every call of the sdpa kernel while it is entered, in this thread alone."""

    def __init__(self, wanted: Bool[Tensor, " queries"], receive: Receive) -> None:
        super().__init__()
        self.queries, self.rows, self.receive = len(wanted), wanted.nonzero()[:, 0], receive

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            self._look(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    @torch.no_grad()
    def _look(
        self,
        query: Float[Tensor, "batch heads queries width"],
        key: Float[Tensor, "batch kv_heads keys width"],
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        if self.queries == 1 and query.shape[2] > 1:
            # transformers packs the query heads that share a key head along the axis of queries.
            query = query.flatten(1, 2)[:, :, None]
        if query.shape[2] != self.queries:
            return  # not the attention itself
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).float().transpose(2, 3)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        columns = torch.arange(key.shape[3], device=key.device)
        chunk = max(SCORES_PER_CHUNK // (query.shape[0] * query.shape[1] * key.shape[3]), 1)
        # Autocast would run the matrix product in half precision.
        with torch.autocast(query.device.type, enabled=False):
            for rows in self.rows.to(query.device).split(chunk):
                scores = query[:, :, rows].float() @ key * scale
                if attn_mask is not None:
                    bias = attn_mask[:, :, rows if attn_mask.shape[2] > 1 else slice(None)]
                    scores = (
                        scores.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else scores + bias.float()
                    )
                elif is_causal:
                    scores = scores.masked_fill(columns > rows[:, None], -torch.inf)
                # A query that sees nothing has NaN here; sdpa gives it zeros.
                self.receive(rows, scores.softmax(dim=-1).nan_to_num())
