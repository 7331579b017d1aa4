"""The log-sum-exp of attention scores, read from the kernel that computes a layer's output."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Kernels that return it in float32, in natural logarithms, as the second output.
KERNELS = (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,)


class LogSumExpWatch(TorchDispatchMode):
    """Reads the log-sum-exp over all keys from the sdpa kernel's own output while it is entered, in this thread only.

    The kernel's call does not change, so its output is the same to the bit. On the CPU, sdpa always runs a kernel that
    reports it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._reported: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in KERNELS:
            self._reported.append(output[1])
        return output

    def of_call(self, query: Float[Tensor, "batch heads queries width"]) -> Tensor | None:
        """Return the log-sum-exp of each query of the one call.

        Args:
            query: Queries of the call.

        Returns:
            `[batch, heads, queries]`; None if no such kernel ran, or not exactly once for these queries.
        """
        if len(self._reported) != 1 or self._reported[0].numel() != query.shape[:3].numel():
            return None
        # transformers packs the heads that share a key head along the axis of queries, for one query.
        return self._reported[0].reshape(query.shape[:3])
