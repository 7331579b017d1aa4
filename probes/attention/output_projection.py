"""How an attention module turns the outputs of its heads into its own output: x = sum of W_h (gate * head_h)."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

PROJECTION_NAMES = ("o_proj", "out_proj")
# Rounding of a gate that is computed again, relative to the largest value.
CHECK_TOLERANCE = 0.01


class OutputProjection:
    """The output projection of one attention module, and the gate before it if there is one (Qwen3.5).

    The projection's matrix is measured by a call on the identity, so adapters (LoRA) and quantised weights count.

    Args:
        attention: A decoder layer's `self_attn`.

    Raises:
        ValueError: The module has no projection with one of the known names.
    """

    def __init__(self, attention: nn.Module) -> None:
        names = [name for name in PROJECTION_NAMES if isinstance(getattr(attention, name, None), nn.Module)]
        if not names:
            raise ValueError(
                f"contribution: {type(attention).__name__} has no output projection named {' or '.join(PROJECTION_NAMES)}"
            )
        self.name, self.attention = names[0], attention
        self.projection: nn.Module = getattr(attention, names[0])
        self._gram: Tensor | None = None
        self._query_projection: Tensor | None = None
        self._expected_input: Tensor | None = None

    def install(self, stack: ExitStack) -> None:
        """Register the hooks, and remove them when `stack` closes.

        Args:
            stack: Gets the callbacks that remove the hooks.
        """
        stack.callback(self.projection.register_forward_pre_hook(self._check_input).remove)
        query_projection = getattr(self.attention, "q_proj", None)
        if isinstance(query_projection, nn.Module):
            stack.callback(query_projection.register_forward_hook(self._keep_query_projection).remove)

    @torch.no_grad()
    def read(self, output: Float[Tensor, "batch queries heads width"]) -> tuple[Tensor, Tensor | None]:
        """Return the Gram matrices of the heads' projections, and the gate of the current call.

        Args:
            output: Output of the attention function.

        Returns:
            W^T W `[heads, width, width]` in float32, and the gate `[batch, heads, queries, width]` or None.
        """
        batch, queries, heads, width = output.shape
        if self._gram is None:
            identity = torch.eye(heads * width, dtype=output.dtype, device=output.device)[None]
            # Hooks of the projection, such as a patch, are not part of its matrix.
            rows = self.projection.forward(identity) - self.projection.forward(torch.zeros_like(identity[:, :1]))
            by_head = rows[0].float().view(heads, width, -1)
            with torch.autocast(output.device.type, enabled=False):
                self._gram = by_head @ by_head.mT
        gate, projected = None, self._query_projection
        if projected is not None and projected.shape[-1] == 2 * heads * width:
            gate = projected.view(batch, queries, heads, 2 * width)[..., width:].sigmoid()
        expected = output if gate is None else output * gate
        self._expected_input = expected.reshape(batch, queries, -1)
        return self._gram, None if gate is None else gate.transpose(1, 2)

    def _keep_query_projection(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._query_projection = output

    def _check_input(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Check that the projection gets the outputs of the heads, which the statistics are of."""
        expected, self._expected_input, self._query_projection = self._expected_input, None, None
        if expected is None:
            return
        given = args[0].reshape(expected.shape)
        if (given - expected).abs().max() > CHECK_TOLERANCE * expected.abs().max():
            raise ValueError(
                f"contribution: {type(self.attention).__name__} changes the outputs of its heads before {self.name} "
                "(an intervention, or a gate that is not known); record without it"
            )
