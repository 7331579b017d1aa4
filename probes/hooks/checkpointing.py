"""Refusal of gradient checkpointing, which runs layers again in the backward pass."""

from __future__ import annotations

import inspect
import sys
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.autograd.function import FunctionCtx
from torch.utils.checkpoint import checkpoint

from probes.hooks.decoder import decoder_layers

# The function behind the decorator, whose frame is on the stack while a checkpointed function runs.
_CHECKPOINT_CODE = inspect.unwrap(checkpoint).__code__


def refuse_checkpointing(decoder: nn.Module) -> list[Any]:
    """Make calls raise if their layers would run again in the backward pass, until the returned hooks are removed.

    Such a repeat would run without an intervention whose block has ended, and give gradients of another function. A
    record would count it as a second prompt.

    A call raises RuntimeError in three cases, each only with gradients: gradient checkpointing is on in training mode;
    the model or a layer runs inside `torch.utils.checkpoint` or another autograd function; or the call is itself such a
    repeat.

    Args:
        decoder: The stack of decoder layers.

    Returns:
        The handles of the hooks.

    Example:
        >>> from probes.hooks.decoder import find_decoder
        >>> for handle in refuse_checkpointing(find_decoder(model)):
        ...     handle.remove()
    """
    # Wrappers checkpoint a layer around its forward, so that only the modules inside it are on the stack.
    parts = [next(layer.children(), layer) for layer in decoder_layers(decoder)]
    return [
        decoder.register_forward_pre_hook(_require_one_pass),
        *(part.register_forward_pre_hook(_require_no_checkpoint) for part in parts),
    ]


def _require_one_pass(decoder: nn.Module, args: Any) -> None:
    if torch._C._current_graph_task_id() != -1:  # the backward pass calls
        raise RuntimeError(
            "the backward pass runs the model again inside a probe's block: call the model without checkpointing"
        )
    modules = (decoder, *decoder_layers(decoder))
    checkpointing = any(getattr(module, "gradient_checkpointing", False) and module.training for module in modules)
    if checkpointing and torch.is_grad_enabled():
        raise RuntimeError(
            f"gradient checkpointing would run the layers of {type(decoder).__name__} again in the backward pass, "
            "without the probe: call model.gradient_checkpointing_disable() first"
        )
    _require_no_checkpoint(decoder, args)


def _require_no_checkpoint(module: nn.Module, args: Any) -> None:
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if name := _repeats_in_backward(frame):
            raise RuntimeError(
                f"{name} would run {type(module).__name__} again in the backward pass, without the probe: call the "
                "model without checkpoints inside a probe's block"
            )
        frame = frame.f_back


def _repeats_in_backward(frame: FrameType) -> str | None:
    """Return the name of the checkpoint function if this frame is one that records gradients."""
    code = frame.f_code
    if code is _CHECKPOINT_CODE:
        repeats = torch.is_grad_enabled() and not frame.f_locals.get("use_reentrant")
        return "torch.utils.checkpoint" if repeats else None
    if code.co_name != "forward" or not code.co_argcount:
        return None
    # Re-entrant checkpoints, of torch and of other libraries, are autograd functions. Without gradients outside them,
    # they have no next functions.
    context = frame.f_locals.get(code.co_varnames[0])
    repeats = isinstance(context, FunctionCtx) and bool(getattr(context, "next_functions", ()))
    return type(context).__name__.removesuffix("Backward") if repeats else None
