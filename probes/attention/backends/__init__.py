"""The same attention record through nnsight and through TransformerLens, to check ours or to join their experiments.

Both show whole attention matrices, so they run the decoder's eager attention and hold one layer's matrix at a time.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from probes.attention.backends.dense import dense_statistics
from probes.attention.backends.shared_copy import twin
from probes.attention.record import RECORDING, AttentionRecord, groups_of_call
from probes.hooks.decoder import decoder_layers, find_decoder
from probes.hooks.partial_call import cut_of
from probes.hooks.token_window import TokenWindow
from probes.tokens.token_map import TokenMap

BACKENDS = ("nnsight", "transformer_lens")

# What an observer is given for each call of each layer: the layer, its masked scores, its attention weights.
See = Callable[[int, Tensor, Tensor], None]


class Detour:
    """Stands in for the forward of a model while a back end runs its twin; keeps the signature, for `generate`."""

    def __init__(self, model: PreTrainedModel, run: Callable[..., Any]) -> None:
        functools.update_wrapper(self, model.forward)
        self._run = run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)


def underlying_model(model: Any, backend: str) -> PreTrainedModel:
    """The transformers model that an `NNsight` or a `TransformerBridge` holds; a model itself is given back.

    Raises:
        ValueError: An unknown back end, or what it cannot take.
        RuntimeError: The model is being recorded through a back end already.
    """
    if isinstance(model, PreTrainedModel):
        if isinstance(vars(model).get("forward"), Detour):
            raise RuntimeError("this model is being recorded already: leave the other record_attention first")
        return model
    if backend == "native":
        raise ValueError(f"a {type(model).__name__} cannot be recorded: pass a transformers model, or name the backend")
    return _library(backend).held(model)


def _library(backend: str) -> Any:
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: choose native, {' or '.join(BACKENDS)}")
    return importlib.import_module(f"probes.attention.backends.{backend}")


@contextmanager
def observe(backend: str, model: Any, stack: str, layers: tuple[int, ...], see: See) -> Iterator[PreTrainedModel]:
    """Calls `see` for each of `layers` of a stack whenever it runs, and yields the model whose stack that is.

    A plain model stays as it is: the back end works on a twin, a second tree of modules over the same weights, and the
    model's own calls, `generate` among them, are led there. A model already wrapped is used as it stands, by its own
    calls: `wrapped.trace(**inputs)` of nnsight, `bridge(...)` or `bridge.original_model(**inputs)` of TransformerLens.
    Either way attention is eager meanwhile.

    Raises:
        ValueError: An unknown back end, or a model that it cannot take.
        RuntimeError: The model is being recorded already.
    """
    library, held = _library(backend), underlying_model(model, backend)
    names = {getattr(getattr(module, "config", None), "_attn_implementation", None) for module in held.modules()}
    if any(str(name).startswith(RECORDING) for name in names):
        raise RuntimeError("this model is being recorded already: leave the other record_attention first")
    own_forward = vars(held).get("forward")
    decoder = held.get_decoder()
    implementation = decoder.config._attn_implementation
    try:
        # The model's own too, as it makes the masks of a static cache ahead of the call.
        decoder.set_attn_implementation("eager")
        if held is not model:
            with library.hooked(model, stack, layers, see):
                yield held
            return
        wrapped = library.wrap(twin(held))
        held.forward = Detour(held, functools.partial(library.run, wrapped))
        with library.hooked(wrapped, stack, layers, see):
            yield library.held(wrapped)
    finally:
        decoder.set_attn_implementation(implementation)
        vars(held).pop("forward", None)
        if own_forward is not None:
            held.forward = own_forward


@contextmanager
def record_through(backend: str, model: Any, tokens: TokenMap, record: AttentionRecord) -> Iterator[None]:
    """Fills `record` from what a back end shows."""
    targets = tuple(tokens.index(target) for target in record.targets)

    def add(layer: int, scores: Tensor, weights: Tensor) -> None:
        cut, keys, heads = cut_of(layers[layer]), scores.shape[-1], list(record.heads)
        groups = groups_of_call(window, cut, keys)
        sums = dense_statistics(scores[:, heads], weights[:, heads], *groups, targets, len(record.sources))
        record._add(layer, window, cut, keys, sums)

    with observe(backend, model, tokens.stack, record.layers, add) as observed:
        decoder = find_decoder(observed, tokens.stack)
        layers, window = decoder_layers(decoder), TokenWindow(decoder, tokens)
        with window:
            yield
