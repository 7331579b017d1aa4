"""Repeat a forward call from a chosen layer, without running the layers before it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

from jaxtyping import Bool
from torch import Tensor, nn
from transformers import PreTrainedModel

from probes.hooks.checkpointing import refuse_checkpointing
from probes.hooks.compiled_code import EagerExecution
from probes.hooks.decoder import decoder_layers, find_decoder, select_layers
from probes.hooks.layer_io import input_states, output_states
from probes.hooks.subset_rerun import SubsetRerun, check_same_shape, override_forward

# Makes calls inside its block start at the given layer.
ResumeFrom = Callable[[int], AbstractContextManager[None]]


@contextmanager
def replay(
    model: PreTrainedModel, starts: Iterable[int], rows: Bool[Tensor, "batch positions"] | None = None
) -> Iterator[ResumeFrom]:
    """Repeat one forward call from chosen layers, to save the layers before an intervention.

    The first call inside the block runs completely, and the output of the layer before each of `starts` is stored.
    After it, the same call inside `resume_from(start)` begins at that layer. The layers before it do not run, whatever
    hooks they have. An intervention whose first layer is `start` then costs only the layers from `start` on.

    Before a start, later calls are as the first call is, with its interventions. The cache of a repeated call cannot be
    used. Memory: one layer output of the whole batch for each start but 0, on the model's device.

    With `rows`, the layers from `start` on run only these positions and the positions that these can change. They
    attend to the keys and values that the other positions had in the first call. So calls inside `resume_from` may
    intervene only at `rows`. Other positions, and padding, leave each layer as in the first call.

    - Hooks around a layer receive whole sequences; hooks inside it receive only the positions that run.
      `record_attention` records the queries that run. Attention or MLP of other positions cannot be patched.
    - The first call must be intact in all layers at the other positions, and must run without a cache of earlier tokens.
    - Memory: states, keys and values of all positions for every layer from the first start on, on the model's device.

    Args:
        model: A transformers model with a decoder.
        starts: Layers that repeated calls resume from. The number of layers is allowed and resumes nothing, as all
            layers have run by then.
        rows: Positions of the language model's call that repeated calls change directly, `[batch, positions]`. To block
            attention from text to the image, these are the text positions after the image. By default all.

    Yields:
        `resume_from`, a function from a layer to a context manager. Inside it, a call of another shape than the first
        raises ValueError. With `rows`, an intervention that changes other positions or drops tokens does so too.

    Raises:
        ValueError: A start is outside the model, or `rows` are given for a model whose layers cannot run on a subset
            of positions.
        RuntimeError: A call with gradient checkpointing, whose layers would run again in the backward pass.

    Example:
        >>> from probes import RemoveTokens, intervene
        >>> layers = range(6)
        >>> with torch.no_grad(), replay(model, layers) as resume_from:
        ...     for start in reversed(layers):  # latest first: the first call is intact before every other start
        ...         with resume_from(start), intervene(model, tokens, RemoveTokens("vision", layers[start:])):
        ...             logits = model(**inputs).logits
    """
    layers = decoder_layers(decoder := find_decoder(model))
    start_layers = select_layers(decoder, {start for start in starts if start != len(layers)})
    subset = None if rows is None or not start_layers else SubsetRerun(decoder, start_layers[0], rows)
    stored: dict[int, tuple[Any, dict[str, Any]]] = {}
    first_call_done = False

    def mark_first_call_done(*call: Any) -> None:
        nonlocal first_call_done
        first_call_done = True

    @contextmanager
    def resume_from(start: int) -> Iterator[None]:
        with ExitStack() as stack:
            for layer in layers[:start] if first_call_done and start in stored else ():
                override_forward(layer, partial(_return_stored, *stored[start]), stack)
            if subset is not None and start in start_layers:
                stack.enter_context(subset.rerun())
            yield

    with ExitStack() as stack:
        stack.enter_context(EagerExecution(decoder))
        for handle in refuse_checkpointing(decoder):
            stack.callback(handle.remove)
        if subset is not None:
            subset.install(stack)
        for start in start_layers:
            if start:

                def store(layer: nn.Module, args: Any, kwargs: Any, output: Any, start: int = start) -> None:
                    if not first_call_done:  # with the keys and values that layers of Gemma 3n and 4 share
                        stored[start] = output, dict(kwargs.get("shared_kv_states") or {})

                stack.callback(layers[start - 1].register_forward_hook(store, with_kwargs=True).remove)
        stack.callback(layers[-1].register_forward_hook(mark_first_call_done).remove)
        yield resume_from


def _return_stored(output: Any, shared_keys: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Return the stored output in place of a layer's forward pass, after a check of the input's shape."""
    if shared_keys:
        kwargs["shared_kv_states"].update(shared_keys)
    check_same_shape(input_states(args, kwargs), output_states(output))
    return output
