"""Attention through nnsight: an edit that reads the softmax of every layer in each trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from probes.hooks.decoder import find_decoder
from probes.unwrapping import unwrap_model

# The first import of nnsight replaces `torch.Tensor.backward` for the whole process. A caller who imported it before
# uses that; otherwise torch's own method returns.
_backward = torch.Tensor.backward
from nnsight import NNsight  # type: ignore[import-untyped]  # noqa: E402
from nnsight.intervention.interleaver import OutOfOrderError  # type: ignore[import-untyped]  # noqa: E402

torch.Tensor.backward = _backward  # type: ignore[method-assign]

if TYPE_CHECKING:
    from probes.attention.backends import ObserveAttention


def wrap(model: PreTrainedModel) -> NNsight:
    """Return an `NNsight` around `model`."""
    return NNsight(model)


def unwrap(wrapped: Any) -> PreTrainedModel:
    """Return the transformers model inside `wrapped`.

    Raises:
        ValueError: `wrapped` is not an NNsight of a transformers model.
    """
    model = unwrap_model(wrapped._module) if isinstance(wrapped, NNsight) else None
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"a {type(wrapped).__name__} cannot be recorded with backend='nnsight': "
            "pass a transformers model or an NNsight of one"
        )
    return model


def call_model(wrapped: NNsight, *args: Any, **kwargs: Any) -> Any:
    """Call the model in a trace, and return its output."""
    with wrapped.trace(*args, **kwargs) as tracer:
        output = tracer.result.save()
    return output


@contextmanager
def observe_layers(wrapped: NNsight, stack: str, layers: tuple[int, ...], observe: ObserveAttention) -> Iterator[None]:
    """Read the attention softmax of `layers` in every trace of `wrapped`, in each step of a generation.

    Reads come before the trace's own edits: a softmax that the trace overwrites is recorded with its original values.

    Args:
        wrapped: The wrapped model.
        stack: The stack of the layers: "decoder" or "prefusion".
        layers: Indices of the layers.
        observe: Called with the layer's index, its masked scores and its attention weights.

    Raises:
        ValueError: Raised in the trace: the attention's code has no call of a softmax.
    """
    decoder = find_decoder(wrapped._module, stack)
    path = next(name for name, module in wrapped._module.named_modules() if module is decoder)
    modules = [wrapped.get(f"{path}.layers.{layer}.self_attn".removeprefix(".")) for layer in layers]
    edits = list(wrapped._edits)
    with wrapped.edit(inplace=True) as tracer:
        steps = tracer.iter[:]  # a traced block may not begin with `try`
        try:
            for _ in steps:
                for layer, module in zip(layers, modules, strict=True):
                    softmax = _find_softmax_call(module)
                    scores = softmax.inputs[0][0]
                    observe(layer, scores, softmax.output)
        except OutOfOrderError:  # an open loop over steps ends with it
            pass
    try:
        yield
    finally:
        # clear_edits would also remove the user's own edits.
        wrapped._edits[:] = edits


def _find_softmax_call(attention: Any) -> Any:
    """Return the call of the softmax inside eager attention, wherever the modelling file has it."""
    calls = [name for name in attention.source.names if name.startswith("attention_interface")]
    # A sink is one more column of the softmax, and would be recorded as a key.
    if calls and not hasattr(attention._module, "sinks"):
        # The first one is the choice of the function, the last one its call.
        source = attention.source.node(calls[-1]).source
        softmax_calls = [name for name in source.names if "softmax" in name]
        if softmax_calls:
            return source.node(softmax_calls[0])
    raise ValueError(
        f"nnsight cannot record {type(attention._module).__name__}: its attention has no softmax over the keys alone; "
        "use backend='native'"
    )
