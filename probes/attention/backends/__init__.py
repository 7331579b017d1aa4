"""The same attention record through nnsight and TransformerLens, to check the native one or to join their experiments.

Both libraries expose whole attention matrices. So the decoder runs eager attention, and one layer's matrix at a time is
in memory.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from probes.attention.attention_switch import is_switched
from probes.attention.backends.dense import dense_statistics
from probes.attention.backends.shared_copy import copy_sharing_weights
from probes.attention.record import AttentionRecord, query_and_key_groups
from probes.hooks.decoder import decoder_layers, find_decoder
from probes.hooks.partial_call import current_subset
from probes.hooks.token_window import TokenWindow
from probes.optional_packages import require_package
from probes.tokens.token_map import TokenMap

BACKENDS = ("nnsight", "transformer_lens")

# Called for each call of each layer with the layer's index, its masked scores and its attention weights.
ObserveAttention = Callable[[int, Tensor, Tensor], None]


class RedirectedForward:
    """Replaces a model's forward while a back end runs a copy of it. It keeps the signature, which `generate` reads.

    Args:
        model: The model whose forward is replaced.
        run: Called instead of the forward.
    """

    def __init__(self, model: PreTrainedModel, run: Callable[..., Any]) -> None:
        functools.update_wrapper(self, model.forward)
        self._run = run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)


def underlying_model(model: Any, backend: str) -> PreTrainedModel:
    """Return the transformers model inside an `NNsight` or a `TransformerBridge`.

    Args:
        model: A wrapped model, or a transformers model, which is returned itself.
        backend: "native", "nnsight" or "transformer_lens".

    Raises:
        ValueError: An unknown back end, or a model that it cannot record.
        RuntimeError: The model is being recorded through a back end already.
    """
    if isinstance(model, PreTrainedModel):
        if isinstance(vars(model).get("forward"), RedirectedForward):
            raise RuntimeError("this model is being recorded already: leave the other record_attention first")
        return model
    if backend == "native":
        raise ValueError(
            f"a {type(model).__name__} cannot be recorded natively: pass the transformers model inside it, or the "
            "backend of an NNsight or TransformerBridge"
        )
    return _backend_module(backend).unwrap(model)


def _backend_module(backend: str) -> Any:
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: choose native, {' or '.join(BACKENDS)}")
    require_package(backend, f"backend={backend!r}")
    # TransformerLens and its dependencies add filters of warnings when they are imported.
    with warnings.catch_warnings():
        return importlib.import_module(f"probes.attention.backends.{backend}")


@contextmanager
def observe_attention(
    backend: str, model: Any, stack: str, layers: tuple[int, ...], observe: ObserveAttention
) -> Iterator[PreTrainedModel]:
    """Call `observe` for each of `layers` of a stack whenever the layer runs.

    A plain model does not change: the back end works on a second tree of modules over the same weights, and the model's
    own calls, including `generate`, are redirected to it. A wrapped model is used directly, through its own calls:
    `wrapped.trace(**inputs)` of nnsight, `bridge(...)` or `bridge.original_model(**inputs)` of TransformerLens. In both
    cases, attention is eager inside the block.

    Args:
        backend: "nnsight" or "transformer_lens".
        model: A transformers model, or one wrapped by the back end.
        stack: The stack of the layers: "decoder" or "prefusion".
        layers: Indices of the layers.
        observe: Called with the layer's index, its masked scores and its attention weights
            (both `[batch, heads, queries, keys]`).

    Yields:
        The model whose stack is observed.

    Raises:
        ValueError: An unknown back end, or a model that it cannot record.
        RuntimeError: The model is being recorded already.
    """
    library, transformers_model = _backend_module(backend), underlying_model(model, backend)
    if any(map(is_switched, transformers_model.modules())):
        raise RuntimeError("this model is being recorded already: leave the other record_attention first")
    instance_forward = vars(transformers_model).get("forward")
    decoder = transformers_model.get_decoder()
    implementation = decoder.config._attn_implementation
    try:
        # Also on the model's own decoder, since it makes the masks of a static cache ahead of the call.
        decoder.set_attn_implementation("eager")
        if transformers_model is not model:
            with library.observe_layers(model, stack, layers, observe):
                yield transformers_model
            return
        wrapped = library.wrap(copy_sharing_weights(transformers_model))
        transformers_model.forward = RedirectedForward(
            transformers_model, functools.partial(library.call_model, wrapped)
        )
        with library.observe_layers(wrapped, stack, layers, observe):
            yield library.unwrap(wrapped)
    finally:
        decoder.set_attn_implementation(implementation)
        vars(transformers_model).pop("forward", None)
        if instance_forward is not None:
            transformers_model.forward = instance_forward


@contextmanager
def record_with_backend(backend: str, model: Any, tokens: TokenMap, record: AttentionRecord) -> Iterator[None]:
    """Fill `record` with the attention that a back end exposes.

    Args:
        backend: "nnsight" or "transformer_lens".
        model: A transformers model, or one wrapped by the back end.
        tokens: Map of the inputs.
        record: The record to fill; it names the layers, heads and targets.

    Raises:
        ValueError: An unknown back end, a model that it cannot record, or a call that does not fit `tokens`.
        RuntimeError: The model is being recorded already.
    """
    targets = tuple(record.target_tokens.index(target) for target in record.targets)

    def add(layer: int, scores: Tensor, weights: Tensor) -> None:
        subset, keys, heads = current_subset(layers[layer]), scores.shape[-1], list(record.heads)
        groups = query_and_key_groups(window, record.target_tokens, subset, keys)
        sums = dense_statistics(scores[:, heads], weights[:, heads], *groups, targets, len(record.sources))
        record._add(layer, window, subset, keys, sums)

    with observe_attention(backend, model, tokens.stack, record.layers, add) as observed:
        decoder = find_decoder(observed, tokens.stack)
        layers, window = decoder_layers(decoder), TokenWindow(decoder, tokens)
        with window:
            yield
