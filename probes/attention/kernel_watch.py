"""Attention weights of chosen queries, taken from the kernel that computes a layer's output."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Attention scores in memory at once (16 MiB in float32).
WATCHED_SCORES_PER_CHUNK = 2**22

SelectQueries = Callable[[], Bool[Tensor, " queries"] | None]
ReceiveWeights = Callable[[Int[Tensor, " rows"], Float[Tensor, "batch heads rows keys"]], None]


class KernelWatch:
    """Hooks one attention module and reports the attention weights of chosen queries, a few queries at a time.

    Under eager attention, these are the module's own weights. Under sdpa, they are computed a second time, in float32,
    from the arguments of the kernel's call. The watch works together with `record_attention`, which registers its own
    attention function.

    Args:
        attention: A decoder layer's `self_attn`.
        select_queries: Called before each call of `attention`. Returns a mask of the queries to report, or None to skip
            the call.
        receive: Called with the indices of some of these queries and their weights.
    """

    def __init__(self, attention: nn.Module, select_queries: SelectQueries, receive: ReceiveWeights) -> None:
        self.attention, self.select_queries, self.receive = attention, select_queries, receive
        self._interception: _SdpaInterception | None = None

    def install(self, stack: ExitStack) -> None:
        """Register the hooks, and remove them when `stack` closes.

        Args:
            stack: Gets the callbacks that remove the hooks.
        """
        stack.callback(self.attention.register_forward_pre_hook(self._begin).remove)
        # Always, since the interception must not outlive a call that raises.
        stack.callback(self.attention.register_forward_hook(self._end, always_call=True).remove)
        stack.callback(self._stop)  # torch calls no hook after a KeyboardInterrupt

    def _begin(self, attention: nn.Module, args: tuple[Any, ...]) -> None:
        selected = self.select_queries()
        if selected is not None:
            self._interception = _SdpaInterception(selected, self.receive)
            self._interception.__enter__()

    def _end(self, attention: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        interception = self._stop()
        if interception is not None and isinstance(output, tuple) and output[1] is not None:
            rows = interception.rows.to(output[1].device)
            self.receive(rows, output[1].detach()[:, :, rows].float())

    def _stop(self) -> _SdpaInterception | None:
        """End the interception of the call, and return it; None if there is none."""
        interception, self._interception = self._interception, None
        if interception is not None:
            interception.__exit__(None, None, None)
        return interception


class _SdpaInterception(TorchFunctionMode):
    """Intercepts every call of the sdpa kernel while it is entered, in this thread only."""

    def __init__(self, selected: Bool[Tensor, " queries"], receive: ReceiveWeights) -> None:
        super().__init__()
        self.query_count, self.rows, self.receive = len(selected), selected.nonzero()[:, 0], receive

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            self._report_weights(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    @torch.no_grad()
    def _report_weights(
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
        """Compute the weights of the chosen queries from the arguments of one sdpa call, and pass them on."""
        if self.query_count == 1 and query.shape[2] > 1:
            # transformers packs the query heads that share a key head along the axis of queries.
            query = query.flatten(1, 2)[:, :, None]
        if query.shape[2] != self.query_count:
            return  # a call of the kernel that is not the layer's attention
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).float().transpose(2, 3)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        columns = torch.arange(key.shape[3], device=key.device)
        chunk = max(WATCHED_SCORES_PER_CHUNK // (query.shape[0] * query.shape[1] * key.shape[3]), 1)
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
                # The softmax of a query without a visible key is NaN; sdpa returns zeros for it.
                self.receive(rows, scores.softmax(dim=-1).nan_to_num())
