"""Tokens removed from chosen layers: hidden from the other tokens, or dropped so that the layers do less work."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from probes.hooks.decoder import decoder_layers, select_attention_layers
from probes.hooks.layer_io import (
    block_edges,
    component_module,
    input_states,
    key_length,
    materialize_mask,
    output_states,
    replace_output_states,
)
from probes.hooks.partial_call import can_run_subset
from probes.hooks.token_window import TokenWindow
from probes.interventions.effects import Effect
from probes.interventions.removal_state import RemovalState
from probes.interventions.selection import (
    DeferredTokenSelector,
    When,
    check_choice,
    check_selector,
    check_when,
    selection_name,
)
from probes.interventions.token_dropping import LayerDropping


@dataclass(frozen=True, eq=False)
class RemoveTokens:
    """Remove tokens from `layers`: no other position attends to them there, and their states pass through unchanged.

    So the tokens return after the last of the layers. LLaVA-Mini's Figure 5 drops vision tokens in blocks of four
    layers, but does not report whether they return. `range(a, b)` removes them inside the block, `range(a, n)` from
    layer a onward.

    With kept position ids, attention cannot distinguish a hidden key from a missing one. So all ways give the same
    logits:

    - `how="mask"`: the layers run on all tokens, and the attention mask hides some. The cache keeps their keys and
      values.
    - `how="drop"`: the layers run without the tokens. Rows with fewer remaining tokens than others get filler. The
      tokens' keys and values never reach the cache of these layers, which is shorter by them. So later steps cannot
      attend to them, whatever `when` is. The cache can be used inside the block only, and must be dynamic.
    - `how="drop"` with `keep_cache=True`: keys and values are computed and cached, so the layers save only the work of
      the MLP. With `when="prefill"`, later steps can attend to the tokens again.

    Args:
        group: A group of the token map, a mask of its positions, or a callable. The callable is called when the first
            of the layers is reached, in a prompt that runs in one call. It returns the mask
            `[rows of the call, positions]`. It may choose no token; the receipt then counts the call with 0 tokens.
        layers: Decoder layers, from 0; an empty collection changes nothing.
        when: Calls in which to act: the prompt's ("prefill"), those of cached steps after it ("decode"), or "both".
        how: "mask" or "drop".
        positions: "keep" the position ids of the remaining tokens, or "renumber" them in these layers as if the removed
            ones had never been there (an option of VTW, Lin et al. 2024). Sliding windows still count all tokens.
        keep_cache: Whether dropped tokens leave their keys and values in the cache.

    Example:
        >>> from probes import RemoveTokens, intervene
        >>> logits = []
        >>> for how in ("mask", "drop"):
        ...     with torch.no_grad(), intervene(model, tokens, RemoveTokens("vision", range(2, 6), how=how)):
        ...         logits.append(model(**inputs).logits)
        >>> torch.allclose(*logits, atol=1e-4)
        True
    """

    group: DeferredTokenSelector
    layers: Collection[int]
    when: When = "both"
    how: Literal["mask", "drop"] = "mask"
    positions: Literal["keep", "renumber"] = "keep"
    keep_cache: bool = False

    def install(self, decoder: PreTrainedModel, window: TokenWindow, stack: ExitStack) -> Effect:
        """Hook the decoder until `stack` closes.

        Args:
            decoder: The stack of decoder layers.
            window: The positions of the map that the current call covers.
            stack: Gets the callbacks that remove the hooks.

        Returns:
            The effect, which fills up as the model runs.

        Raises:
            TypeError: The group is neither a group nor a mask nor a callable.
            ValueError: An unknown layer, group or option; options that exclude each other; or a decoder whose positions
                cannot be renumbered.
        """
        self._check()
        layers = select_attention_layers(decoder, self.layers)
        drops = self.how == "drop" and not self.keep_cache
        # The layers of a TransformerLens bridge take any arguments, and pass them to the model's own.
        is_bridge = any(hasattr(layer, "original_component") for layer in decoder_layers(decoder))
        if drops and not is_bridge and not can_run_subset(decoder, window.tokens.labels.shape[1]):
            raise ValueError(f"{type(decoder).__name__} cannot run its layers on some tokens only: use how='mask'")
        effect = Effect.before_calls(f"RemoveTokens({selection_name(self.group)})", layers)
        shared = RemovalState(decoder, window, self.group, self.when, self.positions, effect)
        for number in layers:
            layer = decoder_layers(decoder)[number]
            if drops:
                LayerDropping(number, layer, shared).install(stack)
            else:
                _LayerMasking(number, layer, shared, cut_mlp=self.keep_cache).install(stack)
        return effect

    def _check(self) -> None:
        check_when(self.when)
        check_selector("group", self.group, deferred=True)
        check_choice("how", self.how, "mask", "drop")
        check_choice("positions", self.positions, "keep", "renumber")
        if self.keep_cache and self.how == "mask":
            raise ValueError("keep_cache=True needs how='drop': how='mask' leaves the cache as it is")
        if self.how == "drop" and not self.keep_cache and self.when == "decode":
            raise ValueError(
                "how='drop' does not work with when='decode': the prompt is in the cache by then; use how='mask'"
            )
        if callable(self.group) and self.when == "decode":
            raise ValueError(
                "when='decode' does not work with a callable group, which is called in the prompt: "
                "pass a group or a mask"
            )
        if self.positions == "renumber" and (self.keep_cache or (self.how == "mask" and self.when != "both")):
            raise ValueError(
                "positions='renumber' needs tokens that are removed in every call: use when='both', or how='drop' "
                "without keep_cache"
            )


class _LayerMasking:
    """The hooks of `RemoveTokens` on one layer whose attention still runs on all tokens."""

    def __init__(self, number: int, layer: nn.Module, shared: RemovalState, cut_mlp: bool) -> None:
        self.number, self.layer, self.shared = number, layer, shared
        self.cut_mlp = cut_mlp
        # Input of the layer's current call; None if nothing is removed in it.
        self.layer_input: Tensor | None = None

    def install(self, stack: ExitStack) -> None:
        """Register the hooks until `stack` closes.

        They come first of the layer's hooks, so that patches and recorders get the layer's final states. But a hook that
        drops tokens has to run after them on the input, and before them on the output.
        """
        stack.callback(self.layer.register_forward_pre_hook(self.before_layer, prepend=True, with_kwargs=True).remove)
        stack.callback(self.layer.register_forward_hook(self.after_layer, prepend=True).remove)
        dropping: LayerDropping | None = getattr(self.layer, "_probes_drop", None)
        if dropping is not None:
            dropping.come_first()
        if self.cut_mlp:
            mlp = component_module(self.layer, "mlp")
            stack.callback(mlp.register_forward_pre_hook(self.before_mlp).remove)
            stack.callback(mlp.register_forward_hook(self.after_mlp, prepend=True).remove)

    def before_layer(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        """Take the tokens out of the attention mask, as queries and as keys."""
        shared, self.layer_input = self.shared, None
        if not shared.is_active:
            return None
        shared.begin()
        keys = key_length(layer, args, kwargs)
        hidden = input_states(args, kwargs)

        def block() -> Tensor | None:
            removed = shared.selection.keys(keys)
            if not removed.any():
                return None
            mask = materialize_mask(layer, kwargs["attention_mask"], hidden, keys)
            blocked = removed[:, None, None, :] | shared.selection.queries[:, None, :, None]
            return block_edges(mask, blocked.to(mask.device))

        mask = shared.once_per_call(("hide", keys), block, kwargs["attention_mask"])
        if mask is None:
            shared.count_empty_choice(self.number)
            return None
        self.layer_input, self.removed = hidden, shared.selection.queries.to(hidden.device)
        shared.effect.add(self.number, int(self.removed.sum()))
        kwargs = kwargs | {"attention_mask": mask}
        return args, kwargs if shared.renumbering is None else shared.renumbering(self.number, hidden, kwargs)

    def after_layer(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Restore the hidden states that the removed positions had before the layer."""
        if self.layer_input is None:
            return None
        states = output_states(output)
        # Hooks see the input of a layer on the device of the layer before.
        removed, layer_input = self.removed.to(states.device), self.layer_input.to(states.device)
        states = torch.where(removed[..., None], layer_input, states)
        return replace_output_states(output, states)

    def before_mlp(self, mlp: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Cut the removed tokens out of the MLP's input."""
        if self.layer_input is None:
            return None
        return args[0][~self.removed.to(args[0].device)][None], *args[1:]

    def after_mlp(self, mlp: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Put zeros at the removed positions of the MLP's output; `after_layer` overwrites them."""
        if self.layer_input is None:
            return None
        remaining = output_states(output)
        states = remaining.new_zeros(*self.removed.shape, remaining.shape[-1])
        states[~self.removed.to(states.device)] = remaining[0]
        return replace_output_states(output, states)
