"""Runs a decoder layer without some of its tokens, and keeps its cache that much shorter."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from probes.hooks.decoder import cache_name
from probes.hooks.layer_io import explicit, hidden_of, hidden_states, key_length, replace_hidden, shortened, with_hidden
from probes.hooks.partial_call import Cut, cut_of, kept_first, set_cut

if TYPE_CHECKING:
    from probes.interventions.removal_state import RemovalState


class ShortenedLayer(DynamicLayer):
    """The cache of one layer that never got the keys of dropped tokens, but counts them in its length.

    The model makes its masks, and its positions, from the length of the first layer's cache.
    """

    missing = 0

    @classmethod
    def of(cls, layer: DynamicLayer) -> ShortenedLayer:
        """Takes over what the layer holds."""
        shortened = cls()
        shortened.__dict__.update(layer.__dict__)
        return shortened

    def get_seq_length(self) -> int:
        """How many tokens have gone by, with or without a key."""
        return super().get_seq_length() + self.missing


class LayerDrop:
    """The hooks of a `RemoveTokens` that drops tokens, on one layer.

    The layer is called on the tokens that stay, and its output put back into the whole sequence, so what is around it
    never sees a shorter one.
    """

    def __init__(self, number: int, layer: nn.Module, shared: RemovalState) -> None:
        self.number, self.layer, self.shared = number, layer, shared
        self.cached: Cut | None = None  # the call before, which says what the cache holds
        self.short = False
        self.entering: Tensor | None = None

    def install(self, stack: ExitStack) -> None:
        """Until `stack` closes. Innermost of the layer's hooks: others are to see whole sequences."""
        if getattr(self.layer, "_probes_drop", None) is not None:
            raise ValueError(f"layer {self.number} drops tokens already: name them all in one RemoveTokens")
        self.layer.__dict__["_probes_drop"] = self
        stack.callback(self.layer.__dict__.pop, "_probes_drop")
        stack.callback(set_cut, self.layer, None)
        stack.callback(self.layer.register_forward_pre_hook(self.shorten, with_kwargs=True).remove)
        stack.callback(self.layer.register_forward_hook(self.lengthen, prepend=True, with_kwargs=True).remove)

    def shorten(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before the layer: cuts states, positions and mask to the tokens that stay."""
        shared, hidden = self.shared, hidden_states(args, kwargs)
        window, once = shared.window, shared.once
        shared.begin()
        self._check_cache(kwargs.get(cache_name(kwargs)))
        if window.start == 0:
            self.cached, self.short = None, False
        elif self.cached is None:
            raise ValueError(
                f"layer {self.number} cannot drop tokens that were cached before the block: run the prompt inside it, "
                "or use how='mask'"
            )
        removed = once(hidden.device, lambda: shared.selection.queries.to(hidden.device) & shared.acts)
        cut = once("cut", lambda: _cut(removed, window.start, self.cached), removed, self.cached)
        self.cached, self.short = cut, self.short or bool(removed.any())
        if not self.short:
            return None
        if kwargs.get("position_embeddings") is None:
            raise ValueError(f"{type(layer).__name__} takes no position_embeddings: use how='mask'")
        keys = key_length(layer, args, kwargs)
        shared.effect.add(self.number, int(removed.sum()))
        self.entering = hidden
        set_cut(layer, cut)
        if shared.renumbering is not None:
            kwargs = shared.renumbering(self.number, hidden, kwargs)
        mask, embeddings = kwargs["attention_mask"], kwargs["position_embeddings"]

        def left() -> dict[str, Any]:
            needed = mask is not None or cut.filled
            return shortened(cut, explicit(layer, mask, hidden, keys) if needed else None, kwargs)

        changed = once(("left", keys), left, mask, embeddings, cut)
        return replace_hidden(args, kwargs | changed, cut.rows(hidden))

    def lengthen(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """After the layer: puts what it made back into the whole sequence, and the tokens it never saw unchanged."""
        cut, entering = cut_of(layer), self.entering
        set_cut(layer, None)
        if cut is None or entering is None:
            return None
        self.entering = None
        short = hidden_of(output)
        index = cut.queries[..., None].expand_as(short)
        short = torch.where(cut.filler[..., None], entering.gather(1, index), short)
        self._count_missing(kwargs.get(cache_name(kwargs)), entering.shape[1] - short.shape[1])
        return with_hidden(output, entering.scatter(1, index, short))

    def _check_cache(self, cache: Any) -> None:
        """Raises ValueError for a cache that cannot be shorter than the sequence."""
        if cache is None:
            return
        index = self.layer.get_submodule("self_attn").layer_idx
        kind = type(cache.layers[index]) if index < len(cache.layers) else cache.layer_class_to_replicate
        if kind not in (DynamicLayer, ShortenedLayer):
            raise ValueError(
                f"how='drop' needs a dynamic cache of all tokens, layer {self.number} has a {kind.__name__}: "
                "use how='mask', or keep_cache=True"
            )

    def _count_missing(self, cache: Any, missing: int) -> None:
        if cache is None:
            return
        index = self.layer.get_submodule("self_attn").layer_idx
        if type(cache.layers[index]) is not ShortenedLayer:
            cache.layers[index] = ShortenedLayer.of(cache.layers[index])
        cache.layers[index].missing += missing


def _cut(removed: Bool[Tensor, "batch queries"], start: int, cached: Cut | None) -> Cut:
    """What is left of a call whose queries start at `start`, after the keys of the calls before."""
    queries, filler = kept_first(removed)
    keys, key_filler = (queries + start).masked_fill(filler, 0), filler
    if cached is not None:
        keys, key_filler = torch.cat([cached.keys, keys], dim=1), torch.cat([cached.key_filler, filler], dim=1)
    return Cut(queries, filler, keys, key_filler, removed.shape[1])
