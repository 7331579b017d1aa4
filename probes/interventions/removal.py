"""Tokens taken out of chosen layers: hidden from the others, or dropped so that the layers do less work."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from probes.hooks.decoder import decoder_layers, select_layers
from probes.hooks.layer_io import component_of, explicit, hidden_of, hidden_states, hide, key_length, with_hidden
from probes.hooks.token_window import TokenWindow
from probes.interventions.effects import Effect
from probes.interventions.removal_state import RemovalState
from probes.interventions.selection import LateTokens, When, check_choice, check_when, describe
from probes.interventions.token_dropping import LayerDrop


@dataclass(frozen=True, eq=False)
class RemoveTokens:
    """Takes tokens out of `layers`: no other position attends to them there, and their own states pass unchanged.

    So they are back after the last of the layers. LLaVA-Mini's Figure 5 drops vision tokens in blocks of four layers
    but does not say whether they come back: `range(a, b)` removes them inside the block, `range(a, n)` from layer a
    onward.

    Both ways give the same logits, since with position ids kept attention cannot tell a hidden key from an absent one:

    - `how="mask"`: the layers work on all tokens, the attention mask hides some. The cache keeps their keys and values.
    - `how="drop"`: the layers run without them, on rows that are filled up where they have fewer tokens left than
      others. Their keys and values never reach the cache of these layers, which is shorter by them; later steps cannot
      see them, whatever `when` says. The cache is of use inside the block only, and has to be a dynamic one.
    - `how="drop"` with `keep_cache=True`: keys and values are made and cached, so the layers save the work of the MLP
      alone, and with `when="prefill"` later steps see the tokens again.

    Args:
        group: A group of the token map, a mask of its positions, or a callable that gives the mask
            `[rows of the call, positions]` once the first of the layers is reached in a prompt that runs in one call.
        layers: Decoder layers, from 0; none is a no-op.
        when: In which calls: the prompt's ("prefill"), those of cached steps after it ("decode"), or "both".
        how: "mask" or "drop".
        positions: "keep" the position ids of the tokens that stay, or "renumber" them in these layers as if the
            removed ones had never been there (a switch of VTW, Lin et al. 2024). Sliding windows still count all.
        keep_cache: Whether dropped tokens leave their keys and values in the cache.
    """

    group: LateTokens
    layers: Collection[int]
    when: When = "both"
    how: Literal["mask", "drop"] = "mask"
    positions: Literal["keep", "renumber"] = "keep"
    keep_cache: bool = False

    def install(self, decoder: PreTrainedModel, window: TokenWindow, stack: ExitStack) -> Effect:
        """Hooks the decoder until `stack` closes."""
        self._check()
        layers = select_layers(decoder, self.layers)
        effect = Effect.of(f"RemoveTokens({describe(self.group)})", layers)
        shared = RemovalState(decoder, window, self.group, self.when, self.positions, effect)
        for number in layers:
            layer = decoder_layers(decoder)[number]
            if self.how == "drop" and not self.keep_cache:
                LayerDrop(number, layer, shared).install(stack)
            else:
                _Hiding(number, layer, shared, cut_mlp=self.keep_cache).install(stack)
        return effect

    def _check(self) -> None:
        check_when(self.when)
        check_choice("how", self.how, "mask", "drop")
        check_choice("positions", self.positions, "keep", "renumber")
        if self.keep_cache and self.how == "mask":
            raise ValueError("keep_cache=True is for how='drop': how='mask' leaves the cache as it is")
        if self.how == "drop" and not self.keep_cache and self.when == "decode":
            raise ValueError(
                "how='drop' with when='decode' cannot be: the prompt is in the cache by then; use how='mask'"
            )
        if callable(self.group) and self.when == "decode":
            raise ValueError("tokens are chosen on the way through the prompt: when='decode' never asks for them")
        if self.positions == "renumber" and (self.keep_cache or (self.how == "mask" and self.when != "both")):
            raise ValueError(
                "positions='renumber' needs tokens that are gone in every call: when='both', or how='drop' without "
                "keep_cache"
            )


class _Hiding:
    """The hooks of `RemoveTokens` on one layer that still runs on all tokens."""

    def __init__(self, number: int, layer: nn.Module, shared: RemovalState, cut_mlp: bool) -> None:
        self.number, self.layer, self.shared = number, layer, shared
        self.cut_mlp = cut_mlp
        self.entering: Tensor | None = None

    def install(self, stack: ExitStack) -> None:
        """Until `stack` closes. First of the layer's hooks, since one that drops tokens has to come after it."""
        stack.callback(self.layer.register_forward_pre_hook(self.hide, prepend=True, with_kwargs=True).remove)
        stack.callback(self.layer.register_forward_hook(self.bypass).remove)
        if self.cut_mlp:
            mlp = component_of(self.layer, "mlp")
            stack.callback(mlp.register_forward_pre_hook(self.shorten).remove)
            stack.callback(mlp.register_forward_hook(self.lengthen, prepend=True).remove)

    def hide(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        """Before the layer: takes the tokens out of the attention mask, as queries and as keys."""
        shared, self.entering = self.shared, None
        if not shared.acts:
            return None
        shared.begin()
        keys = key_length(layer, args, kwargs)
        hidden = hidden_states(args, kwargs)

        def block() -> Tensor | None:
            removed = shared.selection.keys(keys)
            if not removed.any():
                return None
            mask = explicit(layer, kwargs["attention_mask"], hidden, keys)
            blocked = removed[:, None, None, :] | shared.selection.queries[:, None, :, None]
            return hide(mask, blocked.to(mask.device))

        mask = shared.once(("hide", keys), block, kwargs["attention_mask"])
        if mask is None:
            return None
        self.entering, self.removed = hidden, shared.selection.queries.to(hidden.device)
        shared.effect.add(self.number, int(self.removed.sum()))
        kwargs = kwargs | {"attention_mask": mask}
        return args, kwargs if shared.renumbering is None else shared.renumbering(self.number, hidden, kwargs)

    def bypass(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After the layer: gives the removed positions back the hidden states they came with."""
        if self.entering is None:
            return None
        return with_hidden(output, torch.where(self.removed[..., None], self.entering, hidden_of(output)))

    def shorten(self, mlp: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Before the MLP: cuts the removed tokens."""
        if self.entering is None:
            return None
        return args[0][~self.removed][None], *args[1:]

    def lengthen(self, mlp: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After the MLP: zeros in their places, which `bypass` overwrites."""
        if self.entering is None:
            return None
        short = hidden_of(output)
        whole = short.new_zeros(*self.removed.shape, short.shape[-1])
        whole[~self.removed] = short[0]
        return with_hidden(output, whole)
