"""Attention as nnsight shows it: an edit that reads every layer's softmax in each trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from nnsight import NNsight  # type: ignore[import-untyped]
from nnsight.intervention.interleaver import OutOfOrderError  # type: ignore[import-untyped]
from transformers import PreTrainedModel

from probes.hooks.decoder import find_decoder

if TYPE_CHECKING:
    from probes.attention.backends import See


def wrap(model: PreTrainedModel) -> NNsight:
    return NNsight(model)


def held(wrapped: Any) -> PreTrainedModel:
    if not isinstance(wrapped, NNsight) or not isinstance(wrapped._module, PreTrainedModel):
        raise ValueError(f"a {type(wrapped).__name__} is no NNsight of a transformers model: it cannot be recorded")
    return wrapped._module


def run(wrapped: NNsight, *args: Any, **kwargs: Any) -> Any:
    """What the model returns, traced."""
    with wrapped.trace(*args, **kwargs) as tracer:
        output = tracer.result.save()
    return output


@contextmanager
def hooked(wrapped: NNsight, stack: str, layers: tuple[int, ...], see: See) -> Iterator[None]:
    """Reads the softmax of the attention of `layers` in every trace of `wrapped`, in each step of a generation.

    Reads come ahead of the trace's own edits: a softmax that the trace overwrites is recorded as it was.

    Raises (in the trace):
        ValueError: The attention's code has no call of a softmax.
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
                    softmax = _softmax(module)
                    scores = softmax.inputs[0][0]
                    see(layer, scores, softmax.output)
        except OutOfOrderError:  # how an open loop over steps ends
            pass
    try:
        yield
    finally:
        # clear_edits would take the user's own with it.
        wrapped._edits[:] = edits


def _softmax(attention: Any) -> Any:
    """The call of the softmax inside eager attention, wherever the modelling file puts it."""
    calls = [name for name in attention.source.names if name.startswith("attention_interface")]
    # A sink is one more column of the softmax, and would be taken for a key.
    if calls and not hasattr(attention._module, "sinks"):
        # The first is the choice of the function, the last its call.
        source = attention.source.node(calls[-1]).source
        found = [name for name in source.names if "softmax" in name]
        if found:
            return source.node(found[0])
    raise ValueError(
        f"nnsight cannot record {type(attention._module).__name__}: its attention has no softmax over the keys alone; "
        "use backend='native'"
    )
