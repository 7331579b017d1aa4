"""Repeated calls of decoder layers on some positions, which reuse a first call for the other positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import reduce
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from probes.hooks.decoder import cache_name, decoder_layers, select_attention_layers
from probes.hooks.layer_io import (
    input_states,
    key_length,
    materialize_mask,
    output_states,
    replace_input_states,
    replace_output_states,
    subset_arguments,
    visible_edges,
)
from probes.hooks.partial_call import CallSubset, can_run_subset, current_subset, kept_indices, set_current_subset

# The layers of a call share tensors per mask variant: full or sliding window, each with and without an intervention.
_MASK_VARIANTS = 4


class SubsetRerun:
    """Run repeated calls of the layers from `first` on at some positions only.

    The first call runs whole, and keys, values and states of all its positions are stored. Inside `rerun` a layer
    runs on `rows`, and on every position that attends to one of them, directly or through further positions. No other
    position can change, so its output, keys and values are those of the first call.

    Args:
        decoder: A stack from `find_decoder`.
        first: First layer of the repeated calls.
        rows: Mask of the positions to run `[batch, positions]`.

    Raises:
        ValueError: If the layers cannot run on a subset. Calls raise it if `rows` have another shape than the call, or
            if an intervention inside `rerun` changes other positions or drops tokens.
    """

    def __init__(self, decoder: nn.Module, first: int, rows: Bool[Tensor, "batch positions"]) -> None:
        if not can_run_subset(decoder, rows.shape[1]):
            raise ValueError(f"{type(decoder).__name__} cannot run its layers on some rows only; omit `rows`")
        layers = decoder_layers(decoder)
        select_attention_layers(decoder, range(first, len(layers)))
        self.rows = rows
        self.layers = [_RerunLayer(number, layers[number], self) for number in range(first, len(layers))]
        self.subset: CallSubset | None = None
        self.active = False
        self._shared: list[tuple[tuple[Any, ...], Any]] = []

    def install(self, stack: ExitStack) -> None:
        """Override the forward of the layers until `stack` closes."""
        for layer in self.layers:
            override_forward(layer.layer, layer.run, stack)

    @contextmanager
    def rerun(self) -> Iterator[None]:
        """Run calls inside the context on the subset, once the first call has finished."""
        self.active = self.subset is not None
        try:
            yield
        finally:
            self.active = False
            self._shared.clear()

    def finish_first_call(self) -> None:
        """Derive the subset from the attention edges of the first call."""
        edges = reduce(torch.logical_or, {id(layer.edges): layer.edges for layer in self.layers}.values())[:, 0]
        unchanged = ~_affected_positions(self.rows.to(edges.device), edges)
        queries, filler = kept_indices(unchanged)
        keys = torch.arange(unchanged.shape[1], device=unchanged.device).expand_as(unchanged)
        self.subset = CallSubset(queries, filler, keys, torch.zeros_like(unchanged), unchanged.shape[1])
        # A position that no query attends to, such as padding, may change.
        self.checked = unchanged & edges.any(dim=1)

    def share(self, make: Callable[[], Any], *inputs: Any) -> Any:
        """Return `make()`, computed once for the same objects `inputs`, which the layers of a call share."""
        for known_inputs, result in self._shared:
            if len(known_inputs) == len(inputs) and all(a is b for a, b in zip(known_inputs, inputs, strict=True)):
                return result
        self._shared = [*self._shared[1 - _MASK_VARIANTS :], (inputs, make())]
        return self._shared[-1][1]


class _RerunLayer:
    """Store the first call of one layer and run its repeated calls; `update` makes it the cache of these calls."""

    def __init__(self, number: int, layer: nn.Module, owner: SubsetRerun) -> None:
        self.number, self.layer, self.owner = number, layer, owner
        self.forward = layer.forward
        self.key_values: tuple[Tensor, Tensor] | None = None

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Replace the forward of the layer."""
        if self.owner.subset is None:
            return self._first_call(args, kwargs)
        return self._repeated_call(args, kwargs) if self.owner.active else self.forward(*args, **kwargs)

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return keys and values of all positions `[batch, heads, positions, width]`, given those of the call."""
        if self.key_values is None:
            self.key_values = key, value
            return key, value
        assert self.owner.subset is not None
        index = self.owner.subset.to(key.device).queries[:, None, :, None]
        merged = [
            first.scatter(2, index.expand_as(new), new)
            for first, new in zip(self.key_values, (key, value), strict=True)
        ]
        return merged[0], merged[1]

    def get_seq_length(self, layer: int = 0) -> int:
        """Return the number of cached tokens before a call: none, as a call has all its positions."""
        return 0

    def _first_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden, mask = input_states(args, kwargs), kwargs["attention_mask"]
        shape, key_count = list(self.owner.rows.shape), key_length(self.layer, args, kwargs)
        if list(hidden.shape[:2]) != shape or key_count != shape[1]:
            raise ValueError(
                f"`rows` have shape {shape}, but the call has {list(hidden.shape[:2])} positions (batch x length) and "
                f"{key_count} keys; build them from the inputs of this call, and call without a cache"
            )
        self.edges = self.owner.share(
            lambda: visible_edges(materialize_mask(self.layer, mask, hidden, key_count)), mask
        )
        self.hidden, self.key_values = hidden, None
        output = self.forward(*args, **kwargs | {cache_name(kwargs): self})
        self.output = output_states(output)
        if self.key_values is None:
            raise ValueError(f"{type(self.layer).__name__} does not write its keys to a cache; omit `rows`")
        if self is self.owner.layers[-1]:
            self.owner.finish_first_call()
        return output

    def _repeated_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        owner, hidden = self.owner, input_states(args, kwargs)
        if current_subset(self.layer) is not None:
            raise ValueError(f"layer {self.number} runs on some rows only and cannot drop tokens; omit `rows`")
        check_same_shape(hidden, self.hidden)
        if ((hidden != self.hidden).any(dim=-1) & owner.checked.to(hidden.device)).any():
            raise ValueError(_changed_message(self.number, "hidden states"))
        mask, embeddings = kwargs["attention_mask"], kwargs["position_embeddings"]
        shorter = owner.share(lambda: self._shorten(hidden, kwargs), mask, embeddings)
        subset = owner.subset
        assert subset is not None
        args, kwargs = replace_input_states(
            args, kwargs | shorter | {cache_name(kwargs): self}, subset.select_queries(hidden)
        )
        set_current_subset(self.layer, subset)
        try:
            output = self.forward(*args, **kwargs)
        finally:
            set_current_subset(self.layer, None)
        states = output_states(output)
        subset = subset.to(states.device)
        index = subset.queries[..., None].expand_as(states)
        states = torch.where(subset.query_filler[..., None], self.output.gather(1, index), states)
        return replace_output_states(output, self.output.scatter(1, index, states))

    def _shorten(self, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of the subset, after a check that other positions attend as in the first call."""
        mask = materialize_mask(self.layer, kwargs["attention_mask"], hidden, hidden.shape[1])
        checked = self.owner.checked.to(mask.device)
        if ((visible_edges(mask) != self.edges) & checked[:, None, :, None]).any():
            raise ValueError(_changed_message(self.number, "attention edges"))
        assert self.owner.subset is not None
        return subset_arguments(self.owner.subset, mask, kwargs)


def override_forward(layer: nn.Module, forward: Any, stack: ExitStack) -> None:
    """Replace the forward of a layer, inside its hooks, until `stack` closes.

    A forward that a library put on the module is restored afterwards; accelerate does so where weights are offloaded.
    """
    own = vars(layer)  # a layer of a TransformerLens bridge would pass `layer.forward = ...` on to the module inside it
    if "forward" in own:
        stack.callback(own.__setitem__, "forward", own["forward"])
    else:
        stack.callback(own.pop, "forward")
    own["forward"] = forward


def check_same_shape(hidden: Float[Tensor, ...], first: Float[Tensor, ...]) -> None:
    """Check that a repeated call has the shape of the first call.

    Raises:
        ValueError: If it has another shape.
    """
    if hidden.shape != first.shape:
        raise ValueError(
            f"a call of shape {list(hidden.shape)} (batch, length, width) cannot resume one of {list(first.shape)}"
        )


def _affected_positions(
    rows: Bool[Tensor, "batch positions"], edges: Bool[Tensor, "#batch positions positions"]
) -> Bool[Tensor, "batch positions"]:
    """Return the rows and all positions that attend to one of them, directly or through further positions."""
    while True:
        grown = rows | (edges & rows[:, None, :]).any(dim=-1)
        if torch.equal(grown, rows):
            return rows
        rows = grown


def _changed_message(layer: int, what: str) -> str:
    return f"layer {layer}: {what} outside `rows` differ from the first call; include all positions that change"
