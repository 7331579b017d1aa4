"""Tokens taken out of chosen layers."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from probes.decoder import decoder_layers, select_layers
from probes.interventions.masks import explicit, hidden_states, hide, key_length
from probes.interventions.receipt import Effect
from probes.interventions.selection import Selection, Tokens, When, check_when, describe
from probes.tokens import TokenMap


@dataclass(frozen=True, eq=False)
class RemoveTokens:
    """Takes the tokens of `group` out of `layers`, as if they were physically dropped there with position ids kept.

    In these layers no other position can attend to them, also from later decoding steps, and their own hidden states
    pass unchanged, so they are back after the last of the layers. LLaVA-Mini's Figure 5 drops vision tokens in blocks
    of four layers but does not say whether they come back: `range(a, b)` removes them inside the block, `range(a, n)`
    from layer a onward.

    Args:
        group: A group of the token map, or a mask of its positions.
        layers: Decoder layers, from 0; none is a no-op.
        when: In which calls: the prompt's ("prefill"), those of cached steps after it ("decode"), or "both".
    """

    group: Tokens
    layers: Collection[int]
    when: When = "both"

    def install(self, decoder: PreTrainedModel, tokens: TokenMap, stack: ExitStack) -> Effect:
        """Hooks the decoder until `stack` closes."""
        check_when(self.when)
        layers = select_layers(decoder, self.layers)
        effect = Effect.of(f"RemoveTokens({describe(self.group)})", layers)
        chosen = Selection(decoder, tokens, self.group)
        if layers:
            stack.enter_context(chosen)
        removal = _Removal(decoder, chosen, self.when, effect)
        for layer in layers:
            module = decoder_layers(decoder)[layer]
            stack.callback(module.register_forward_pre_hook(removal.hide, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(removal.bypass, with_kwargs=True).remove)
        return effect


class _Removal:
    """The forward hooks of `RemoveTokens` on a decoder's layers."""

    def __init__(self, decoder: PreTrainedModel, chosen: Selection, when: When, effect: Effect) -> None:
        self.layer_of = {module: layer for layer, module in enumerate(decoder_layers(decoder))}
        self.chosen, self.when, self.effect = chosen, when, effect

    def hide(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        """Before the layer: takes the group out of the attention mask, as queries and as keys."""
        if not self.chosen.acts(self.when):
            return None
        hidden, keys = hidden_states(args, kwargs), key_length(layer, args, kwargs)
        removed = self.chosen.keys(keys)
        if not removed.any():
            return None
        self.effect.add(self.layer_of[layer], int(self.chosen.queries.sum()))
        mask = explicit(layer, kwargs["attention_mask"], hidden, keys)
        blocked = removed[:, None, None, :] | self.chosen.queries[:, None, :, None]
        return args, kwargs | {"attention_mask": hide(mask, blocked)}

    def bypass(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """After the layer: gives the removed positions back the hidden states they came with."""
        if not self.chosen.acts(self.when):
            return None
        removed = self.chosen.queries[..., None]
        if isinstance(output, tuple):
            return torch.where(removed, hidden_states(args, kwargs), output[0]), *output[1:]
        return torch.where(removed, hidden_states(args, kwargs), output)
