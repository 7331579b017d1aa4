"""Decoder layers that run without some of the tokens, and whose cache is shorter by these tokens."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import DynamicLayer

from probes.hooks.decoder import cache_name
from probes.hooks.layer_io import (
    input_states,
    key_length,
    materialize_mask,
    output_states,
    replace_input_states,
    replace_output_states,
    subset_arguments,
)
from probes.hooks.partial_call import CallSubset, current_subset, kept_indices, set_current_subset

if TYPE_CHECKING:
    from probes.interventions.removal_state import RemovalState


class ShortenedCacheLayer(DynamicLayer):
    """The cache of one layer without the keys of dropped tokens, which its length counts nevertheless.

    The model builds its masks and its positions from the length of the first layer's cache.

    Attributes:
        missing: Number of dropped tokens.
    """

    missing = 0

    @classmethod
    def from_layer(cls, layer: DynamicLayer) -> ShortenedCacheLayer:
        """Return a layer with the keys and values of `layer`."""
        shortened = cls()
        shortened.__dict__.update(layer.__dict__)
        return shortened

    def get_seq_length(self) -> int:
        """Return the number of tokens so far, with or without a key."""
        return super().get_seq_length() + self.missing


class LayerDropping:
    """The hooks of a `RemoveTokens` that drops tokens, on one layer.

    The layer runs on the remaining tokens, and its output is put back into the whole sequence. So the modules around it
    never get a shorter sequence.

    Args:
        number: Index of the layer.
        layer: The layer.
        shared: State that the layers of the `RemoveTokens` share.
    """

    def __init__(self, number: int, layer: nn.Module, shared: RemovalState) -> None:
        self.number, self.layer, self.shared = number, layer, shared
        # Subset of the call before; it names the tokens in the cache.
        self.cached_subset: CallSubset | None = None
        self.has_dropped = False
        self.layer_input: Tensor | None = None
        self.handle: RemovableHandle | None = None

    def install(self, stack: ExitStack) -> None:
        """Register the hooks until `stack` closes.

        They are the innermost of the layer's hooks: others should get whole sequences.

        Raises:
            ValueError: Another `RemoveTokens` drops tokens from this layer.
        """
        if getattr(self.layer, "_probes_drop", None) is not None:
            raise ValueError(f"layer {self.number} drops tokens already: name all tokens in one RemoveTokens")
        self.layer.__dict__["_probes_drop"] = self
        stack.callback(self.layer.__dict__.pop, "_probes_drop")
        stack.callback(set_current_subset, self.layer, None)
        stack.callback(self.layer.register_forward_pre_hook(self.before_layer, with_kwargs=True).remove)
        self.come_first()
        stack.callback(self.remove_hook)

    def come_first(self) -> None:
        """Put the hook on the layer's output before those that others have put first since."""
        self.remove_hook()
        self.handle = self.layer.register_forward_hook(self.after_layer, prepend=True, with_kwargs=True)

    def remove_hook(self) -> None:
        """Remove the hook on the layer's output, if there is one."""
        if self.handle is not None:
            self.handle.remove()

    def before_layer(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Cut states, positions and mask to the remaining tokens."""
        shared, hidden = self.shared, input_states(args, kwargs)
        window, once_per_call = shared.window, shared.once_per_call
        shared.begin()
        self._check_cache(kwargs.get(cache_name(kwargs)))
        if window.start == 0:
            self.cached_subset, self.has_dropped = None, False
        elif self.cached_subset is None:
            raise ValueError(
                f"layer {self.number} cannot drop tokens that were cached before the block: run the prompt inside it, "
                "or use how='mask'"
            )
        removed = once_per_call(hidden.device, lambda: shared.selection.queries.to(hidden.device) & shared.is_active)
        subset = once_per_call(
            "cut", lambda: _remaining_subset(removed, window.start, self.cached_subset), removed, self.cached_subset
        )
        self.cached_subset, self.has_dropped = subset, self.has_dropped or bool(removed.any())
        if not self.has_dropped:
            shared.count_empty_choice(self.number)
            return None
        if kwargs.get("position_embeddings") is None:
            raise ValueError(f"{type(layer).__name__} takes no position_embeddings: use how='mask'")
        keys = key_length(layer, args, kwargs)
        shared.effect.add(self.number, int(removed.sum()))
        self.layer_input = hidden
        set_current_subset(layer, subset)
        if shared.renumbering is not None:
            kwargs = shared.renumbering(self.number, hidden, kwargs)
        mask, embeddings = kwargs["attention_mask"], kwargs["position_embeddings"]

        def remaining_arguments() -> dict[str, Any]:
            needs_mask = mask is not None or subset.has_filler
            return subset_arguments(subset, materialize_mask(layer, mask, hidden, keys) if needs_mask else None, kwargs)

        changed = once_per_call(("left", keys), remaining_arguments, mask, embeddings, subset)
        return replace_input_states(args, kwargs | changed, subset.select_queries(hidden))

    def after_layer(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Put the layer's output back into the whole sequence, with the dropped tokens unchanged."""
        subset, layer_input = current_subset(layer), self.layer_input
        set_current_subset(layer, None)
        if subset is None or layer_input is None:
            return None
        self.layer_input = None
        remaining = output_states(output)
        # Hooks see the input of a layer on the device of the layer before.
        subset, layer_input = subset.to(remaining.device), layer_input.to(remaining.device)
        index = subset.queries[..., None].expand_as(remaining)
        remaining = torch.where(subset.query_filler[..., None], layer_input.gather(1, index), remaining)
        self._count_missing(kwargs.get(cache_name(kwargs)), layer_input.shape[1] - remaining.shape[1])
        return replace_output_states(output, layer_input.scatter(1, index, remaining))

    def _check_cache(self, cache: Any) -> None:
        """Check that the layer's cache can be shorter than the sequence.

        Raises:
            ValueError: It cannot.
        """
        if cache is None:
            return
        index = self.layer.get_submodule("self_attn").layer_idx
        cache_type = type(cache.layers[index]) if index < len(cache.layers) else cache.layer_class_to_replicate
        if cache_type not in (DynamicLayer, ShortenedCacheLayer):
            raise ValueError(
                f"layer {self.number} has a {cache_type.__name__}, but how='drop' needs a dynamic cache of all tokens: "
                "use how='mask', or keep_cache=True"
            )

    def _count_missing(self, cache: Any, missing: int) -> None:
        """Make the layer's cache count `missing` more tokens than it has keys."""
        if cache is None:
            return
        index = self.layer.get_submodule("self_attn").layer_idx
        if type(cache.layers[index]) is not ShortenedCacheLayer:
            cache.layers[index] = ShortenedCacheLayer.from_layer(cache.layers[index])
        cache.layers[index].missing += missing


def _remaining_subset(removed: Bool[Tensor, "batch queries"], start: int, cached: CallSubset | None) -> CallSubset:
    """Return the remaining queries and keys of a call.

    Args:
        removed: Which queries are removed.
        start: Position of the first query.
        cached: The subset of the call before, whose keys are in the cache.
    """
    queries, filler = kept_indices(removed)
    keys, key_filler = (queries + start).masked_fill(filler, 0), filler
    if cached is not None:
        keys, key_filler = torch.cat([cached.keys, keys], dim=1), torch.cat([cached.key_filler, filler], dim=1)
    return CallSubset(queries, filler, keys, key_filler, removed.shape[1])
