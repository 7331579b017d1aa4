"""Refusal of gradient checkpointing, which runs layers again in the backward pass."""

from __future__ import annotations

import torch
from torch import nn

from probes.hooks.decoder import decoder_layers


def require_one_pass(decoder: nn.Module) -> None:
    """Check that the layers of the call that begins will not run again in the backward pass.

    Such a repeat would run without an intervention whose block has ended, and give gradients of another function. A
    record would count it as a second prompt.

    Args:
        decoder: The stack of decoder layers that is called.

    Raises:
        RuntimeError: If gradient checkpointing is on, in training mode and with gradients, or if the call is itself
            such a repeat.

    Example:
        >>> from probes.hooks.decoder import find_decoder
        >>> require_one_pass(find_decoder(model))
    """
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
