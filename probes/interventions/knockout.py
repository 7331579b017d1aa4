"""Attention knock-out: edges between token groups cut in chosen layers."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool
from torch import Tensor, nn
from transformers import PreTrainedModel

from probes.attention.kernel_watch import KernelWatch
from probes.hooks.decoder import decoder_layers, select_attention_layers
from probes.hooks.layer_io import block_edges, input_states, key_length, materialize_mask, visible_edges
from probes.hooks.partial_call import current_subset
from probes.hooks.token_window import TokenWindow
from probes.interventions.effects import Effect
from probes.interventions.selection import (
    PerCallCache,
    TokenSelection,
    TokenSelector,
    When,
    acts_in_current_call,
    check_selector,
    check_when,
    selection_name,
)


@dataclass(frozen=True, eq=False)
class BlockAttention:
    """Block the attention from queries of `target` to keys of `source` in `layers` (knock-out, Geva et al. 2023).

    All other edges stay, and so do states, positions and cache. Tokens in both groups cannot attend to themselves
    either. A query without any key left gets an attention output of 0. Generated tokens are in the map's `generated`
    group, so blocking `instruction` leaves their edges. To block these too, pool the groups with `tokens.merge`, or
    pass a second `BlockAttention`.

    Args:
        source: Group of the keys, or a mask of positions `[batch, positions]`.
        target: Group of the queries, or a mask of positions `[batch, positions]`.
        layers: Decoder layers, from 0; an empty collection changes nothing.
        when: Calls in which to act: the prompt's ("prefill"), those of cached steps after it ("decode"), or "both".

    Example:
        >>> from probes import BlockAttention, intervene
        >>> with torch.no_grad(), intervene(model, tokens, BlockAttention("vision", "instruction", [0, 1])) as receipt:
        ...     output = model(**inputs)
        >>> print(receipt)
        BlockAttention(vision -> instruction): 2 calls of layers [0, 1], 12 tokens, blocked mass 0
    """

    source: TokenSelector
    target: TokenSelector
    layers: Collection[int]
    when: When = "both"

    def install(self, decoder: PreTrainedModel, window: TokenWindow, stack: ExitStack) -> Effect:
        """Hook the decoder until `stack` closes.

        Args:
            decoder: The stack of decoder layers.
            window: The positions of the map that the current call covers.
            stack: Gets the callbacks that remove the hooks.

        Returns:
            The effect, which fills up as the model runs.

        Raises:
            ValueError: An unknown layer, group or `when`, or a mask that does not fit the map.
            TypeError: Source or target is neither a group nor a mask.
        """
        check_when(self.when)
        check_selector("source", self.source)
        check_selector("target", self.target)
        layers = select_attention_layers(decoder, self.layers)
        effect = Effect.before_calls(
            f"BlockAttention({selection_name(self.source)} -> {selection_name(self.target)})", layers
        )
        edges = _EdgeSelection(
            window, TokenSelection(window, self.source), TokenSelection(window, self.target), self.when
        )
        for layer in layers:
            _LayerKnockout(layer, decoder_layers(decoder)[layer], edges, effect).install(stack)
        return effect


@dataclass(frozen=True, eq=False)
class _BlockedEdges:
    """The edges that are cut in a call.

    Attributes:
        edges: Edges that are visible to begin with, and cut.
        changed_queries: Queries that lose an edge.
        without_key: Queries that lose their last edge; None if there are none.
        mask: The attention mask without the edges.
    """

    edges: Bool[Tensor, "batch 1 queries keys"]
    changed_queries: Bool[Tensor, "batch queries"]
    without_key: Bool[Tensor, "batch queries"] | None
    mask: Tensor


class _EdgeSelection:
    """The edges of a `BlockAttention`, which all its layers cut."""

    def __init__(self, window: TokenWindow, source: TokenSelection, target: TokenSelection, when: When) -> None:
        self.window, self.source, self.target, self.when = window, source, target, when
        self.once_per_call = PerCallCache(window)

    def blocked(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _BlockedEdges | None:
        """Return the edges to cut in the layer's call; None if no edge is visible to begin with."""
        if not acts_in_current_call(self.window, self.when):
            return None
        keys = key_length(layer, args, kwargs)

        def block() -> _BlockedEdges | None:
            mask = materialize_mask(layer, kwargs["attention_mask"], input_states(args, kwargs), keys)
            edges = self.target.queries[:, None, :, None] & self.source.keys(keys)[:, None, None, :]
            edges, visible = edges.to(mask.device), visible_edges(mask)
            cut = edges & visible
            if not cut.any():
                return None
            changed_queries = cut.any(dim=-1)[:, 0]
            without_key = changed_queries & ~(visible & ~edges).any(dim=-1)[:, 0]
            return _BlockedEdges(
                cut, changed_queries, without_key if without_key.any() else None, block_edges(mask, cut)
            )

        return self.once_per_call(keys, block, kwargs["attention_mask"])


class _LayerKnockout:
    """The hooks of `BlockAttention` on one decoder layer."""

    def __init__(self, number: int, layer: nn.Module, edges: _EdgeSelection, effect: Effect) -> None:
        self.number, self.layer, self.edges, self.effect = number, layer, edges, effect
        self.blocked: _BlockedEdges | None = None
        self.mass: float | None = None

    def install(self, stack: ExitStack) -> None:
        """Register the hooks until `stack` closes.

        They come first of the layer's hooks, since a hook that drops tokens has to run after them.
        """
        attention = self.layer.get_submodule("self_attn")
        stack.callback(self.layer.register_forward_pre_hook(self.before_layer, prepend=True, with_kwargs=True).remove)
        KernelWatch(attention, self.queries_to_measure, self.measure).install(stack)
        stack.callback(attention.register_forward_hook(self.after_attention).remove)

    def before_layer(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Take the edges out of the layer's attention mask."""
        self.blocked, self.mass = self.edges.blocked(layer, args, kwargs), None
        if self.blocked is None:
            return None
        self.effect.add(self.number, int(self.blocked.changed_queries.sum()))
        return args, kwargs | {"attention_mask": self.blocked.mask}

    def queries_to_measure(self) -> Bool[Tensor, " queries"] | None:
        """Return the queries whose attention weights to measure in the coming call of the attention."""
        if self.blocked is None:
            return None
        edges, without_key, subset = self.blocked.edges, self.blocked.without_key, current_subset(self.layer)
        if subset is not None:
            edges = subset.select_edges(edges) & ~subset.to(edges.device).key_filler[:, None, None, :]
            without_key = None if without_key is None else subset.select_queries(without_key)
        self.cut_edges, self.without_key = edges.to(self.blocked.mask.device), without_key
        return edges.any(dim=-1)[:, 0].any(dim=0)

    def measure(self, rows: Tensor, weights: Tensor) -> None:
        """Update the most attention that one of these queries has on its blocked keys."""
        rows = rows.to(self.cut_edges.device)
        remaining = (weights * self.cut_edges[:, :, rows].to(weights.device)).sum(dim=-1)
        if self.without_key is not None:
            # `after_attention` sets the output of these queries to 0.
            remaining = remaining.masked_fill(
                self.without_key[:, None, rows.to(self.without_key.device)].to(remaining.device), 0.0
            )
        self.mass = max(self.mass or 0.0, float(remaining.max()) if remaining.numel() else 0.0)

    def after_attention(self, attention: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Check that blocked keys have no attention, and set the output of queries without a key to 0."""
        if self.blocked is None:
            return None
        if self.mass is None or self.mass != 0:
            problem = "could not be measured" if self.mass is None else f"is {self.mass:g}, not 0,"
            raise RuntimeError(
                f"the attention on blocked keys {problem} in layer {self.number}: {type(attention).__name__} "
                "does not follow its mask"
            )
        self.effect.mass[self.number] = max(self.mass, self.effect.mass.get(self.number, 0.0))
        if self.without_key is None:
            return None
        result, *rest = output
        return result.masked_fill(self.without_key[..., None].to(result.device), 0.0), *rest
