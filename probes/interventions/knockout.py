"""Attention knock-out: edges between groups of tokens cut in chosen layers."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool
from torch import Tensor, nn
from transformers import PreTrainedModel

from probes.attention.kernel_watch import KernelWatch
from probes.hooks.decoder import decoder_layers, select_layers
from probes.hooks.layer_io import explicit, hidden_states, hide, key_length, visible
from probes.hooks.partial_call import cut_of
from probes.hooks.token_window import TokenWindow
from probes.interventions.effects import Effect
from probes.interventions.selection import OncePerCall, Selection, Tokens, When, acts, check_when, describe


@dataclass(frozen=True, eq=False)
class BlockAttention:
    """Queries of `target` do not see keys of `source` in `layers` (attention knock-out, Geva et al. 2023).

    All other edges stay, and so do states, positions and cache. Tokens that are of both do not see themselves either.
    A query that is left with no key at all takes nothing in: the output of its attention is 0. Generated tokens are
    of the map's `generated` group, so blocking `instruction` leaves them seeing; to block them too, pool the groups
    with `tokens.merge`, or pass a second `BlockAttention`.

    Args:
        source: Group of the keys, or a mask of positions.
        target: Group of the queries, or a mask of positions.
        layers: Decoder layers, from 0; none is a no-op.
        when: In which calls: the prompt's ("prefill"), those of cached steps after it ("decode"), or "both".
    """

    source: Tokens
    target: Tokens
    layers: Collection[int]
    when: When = "both"

    def install(self, decoder: PreTrainedModel, window: TokenWindow, stack: ExitStack) -> Effect:
        """Hooks the decoder until `stack` closes."""
        check_when(self.when)
        layers = select_layers(decoder, self.layers)
        effect = Effect.of(f"BlockAttention({describe(self.source)} -> {describe(self.target)})", layers)
        edges = _Edges(window, Selection(window, self.source), Selection(window, self.target), self.when)
        for layer in layers:
            _Knockout(layer, decoder_layers(decoder)[layer], edges, effect).install(stack)
        return effect


@dataclass(frozen=True, eq=False)
class _Blocked:
    """What is cut in a call: the edges, the queries that lose one, those that lose their last one, the mask left."""

    edges: Bool[Tensor, "batch 1 queries keys"]
    touched: Bool[Tensor, "batch queries"]
    blind: Bool[Tensor, "batch queries"] | None
    mask: Tensor


class _Edges:
    """The edges of a `BlockAttention`, which all its layers cut."""

    def __init__(self, window: TokenWindow, source: Selection, target: Selection, when: When) -> None:
        self.window, self.source, self.target, self.when = window, source, target, when
        self.once = OncePerCall(window)

    def blocked(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Blocked | None:
        """Of the layer's call; None where no edge is visible to begin with."""
        if not acts(self.window, self.when):
            return None
        keys = key_length(layer, args, kwargs)

        def block() -> _Blocked | None:
            mask = explicit(layer, kwargs["attention_mask"], hidden_states(args, kwargs), keys)
            edges = self.target.queries[:, None, :, None] & self.source.keys(keys)[:, None, None, :]
            edges, seen = edges.to(mask.device), visible(mask)
            cut = edges & seen
            if not cut.any():
                return None
            touched = cut.any(dim=-1)[:, 0]
            blind = touched & ~(seen & ~edges).any(dim=-1)[:, 0]
            return _Blocked(cut, touched, blind if blind.any() else None, hide(mask, cut))

        return self.once(keys, block, kwargs["attention_mask"])


class _Knockout:
    """The hooks of `BlockAttention` on one decoder layer."""

    def __init__(self, number: int, layer: nn.Module, edges: _Edges, effect: Effect) -> None:
        self.number, self.layer, self.edges, self.effect = number, layer, edges, effect
        self.blocked: _Blocked | None = None
        self.mass: float | None = None

    def install(self, stack: ExitStack) -> None:
        """Until `stack` closes. First of the layer's hooks, since one that drops tokens has to come after it."""
        attention = self.layer.get_submodule("self_attn")
        stack.callback(self.layer.register_forward_pre_hook(self.hide, prepend=True, with_kwargs=True).remove)
        KernelWatch(attention, self.wanted, self.weigh).install(stack)
        stack.callback(attention.register_forward_hook(self.settle).remove)

    def hide(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before the layer: takes the edges out of the attention mask."""
        self.blocked, self.mass = self.edges.blocked(layer, args, kwargs), None
        if self.blocked is None:
            return None
        self.effect.add(self.number, int(self.blocked.touched.sum()))
        return args, kwargs | {"attention_mask": self.blocked.mask}

    def wanted(self) -> Bool[Tensor, " queries"] | None:
        """Before the attention: the queries whose weights are to be looked at."""
        if self.blocked is None:
            return None
        edges, blind, cut = self.blocked.edges, self.blocked.blind, cut_of(self.layer)
        if cut is not None:
            edges = cut.edges(edges) & ~cut.key_filler[:, None, None, :]
            blind = None if blind is None else cut.rows(blind)
        self.cut_edges, self.blind = edges.to(self.blocked.mask.device), blind
        return edges.any(dim=-1)[:, 0].any(dim=0)

    def weigh(self, rows: Tensor, weights: Tensor) -> None:
        """Notes the most attention that one of these queries puts on its blocked keys."""
        left = (weights * self.cut_edges[:, :, rows].to(weights.device)).sum(dim=-1)
        if self.blind is not None:
            left = left.masked_fill(self.blind[:, None, rows].to(left.device), 0.0)  # silenced below
        self.mass = max(self.mass or 0.0, float(left.max()) if left.numel() else 0.0)

    def settle(self, attention: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After the attention: checks the blocked mass, and silences the queries without a key."""
        if self.blocked is None:
            return None
        if self.mass is None or self.mass != 0:
            what = "could not be measured" if self.mass is None else f"is {self.mass:g}, not 0,"
            raise RuntimeError(
                f"the attention on blocked keys {what} in layer {self.number}: {type(attention).__name__} "
                "does not follow its mask"
            )
        self.effect.mass[self.number] = max(self.mass, self.effect.mass.get(self.number, 0.0))
        if self.blind is None:
            return None
        result, *rest = output
        return result.masked_fill(self.blind[..., None].to(result.device), 0.0), *rest
