"""Activation patching and ablation: the output of a layer, its attention or its MLP, replaced at chosen positions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from probes.hooks.decoder import decoder_layers, select_layers
from probes.hooks.layer_io import COMPONENTS, component_module, output_states, replace_output_states
from probes.hooks.partial_call import current_subset
from probes.hooks.token_window import TokenWindow
from probes.interventions.effects import Effect
from probes.interventions.selection import (
    TokenSelection,
    TokenSelector,
    When,
    acts_in_current_call,
    check_choice,
    check_selector,
    check_when,
    selection_name,
)
from probes.readouts.hidden_states import States

NAMED_VALUES = ("zero", "mean", "noise")
# torch draws normal numbers in blocks of this size. With whole blocks, a longer draw begins with the shorter one.
_NOISE_BLOCK = 16


@dataclass(frozen=True, eq=False)
class PatchActivations:
    """Replace activations at the tokens `at`, in `layers`.

    Let n be the number of these tokens in the batch, in order of sample and position. Then `values` are one of:

    - `States` of another run (activation patching, Vig et al. 2020; the restoring run of causal tracing, Meng et al.
      2022). They must be of these layers and this component, recorded at n positions of any other token map. Only
      tokens of the prompt are patched.
    - A mapping from layer to a tensor `[n, width]` or `[width]`, such as the mean over another run's states:
      `{layer: states[layer].mean(0) for layer in states.layers}`.
    - "zero": zeros.
    - "mean": the mean over the sample's own tokens `at` in this call, so that they no longer differ.
    - "noise": the activations plus Gaussian noise of standard deviation `std` (the corrupted run of causal tracing).
      The j-th of these tokens gets the same noise in every sample, so a batch gives the same results as its rows.

    Args:
        at: Group of tokens, or a mask of positions `[batch, positions]`.
        layers: Decoder layers, from 0; an empty collection changes nothing.
        component: "residual" (the layer's output), "attention" or "mlp" (what that part adds to the residual). The residual
            of visual tokens cannot be patched in layers after which the model adds image features (DeepStack in Qwen3-VL).
        values: The activations to put there.
        when: Calls in which to act: the prompt's ("prefill"), those of cached steps after it ("decode"), or "both".
        std: Standard deviation of the noise.
        seed: Seed of the noise.

    Example:
        >>> from probes import PatchActivations, intervene
        >>> patch = PatchActivations("vision", [0], "residual", "noise", std=1.0)
        >>> with torch.no_grad(), intervene(model, tokens, patch) as receipt:
        ...     output = model(**inputs)
        >>> print(receipt)
        PatchActivations(vision, residual): 1 calls of layers [0], 36 tokens
    """

    at: TokenSelector
    layers: Collection[int]
    component: Literal["residual", "attention", "mlp"]
    values: States | Mapping[int, Tensor] | Literal["zero", "mean", "noise"]
    when: When = "both"
    std: float = 0.0
    seed: int = 0

    def install(self, decoder: PreTrainedModel, window: TokenWindow, stack: ExitStack) -> Effect:
        """Hook the decoder until `stack` closes.

        Args:
            decoder: The stack of decoder layers.
            window: The positions of the map that the current call covers.
            stack: Gets the callbacks that remove the hooks.

        Returns:
            The effect, which fills up as the model runs.

        Raises:
            ValueError: An unknown layer, group, component or `when`, or values that do not fit or are not finite.
            TypeError: Values of another type, or `at` is neither a group nor a mask.
        """
        check_selector("at", self.at)
        layers = select_layers(decoder, self.layers)
        selection = TokenSelection(window, self.at)
        self._check(layers, selection, decoder.config.hidden_size)
        effect = Effect.before_calls(f"PatchActivations({selection_name(self.at)}, {self.component})", layers)
        added = _AddedFeatures()
        stack.callback(decoder.register_forward_pre_hook(added.before_call, with_kwargs=True).remove)
        for number in layers:
            layer = decoder_layers(decoder)[number]
            patch = _LayerPatch(number, layer, window, selection, self, effect, added)
            stack.callback(component_module(layer, self.component).register_forward_hook(patch).remove)
        return effect

    def _check(self, layers: tuple[int, ...], selection: TokenSelection, width: int) -> None:
        check_when(self.when)
        if isinstance(self.values, str):
            check_choice("values", self.values, *NAMED_VALUES)
        elif not isinstance(self.values, (States, Mapping)):
            raise TypeError(
                f"values: found a {type(self.values).__name__}; pass {', '.join(map(repr, NAMED_VALUES))}, recorded states, "
                "or a dictionary from layers to tensors"
            )
        if (isinstance(self.values, str) and self.values == "noise") != (self.std > 0):
            raise ValueError(f"std={self.std:g} does not fit: values='noise' need a positive std, other values std=0")
        if isinstance(self.values, str):
            return
        if isinstance(self.values, States) and self.values.component != self.component:
            raise ValueError(f"values are of component {self.values.component!r}: pass states of {self.component!r}")
        value_layers = self.values.layers if isinstance(self.values, States) else self.values
        if missing := [layer for layer in layers if layer not in value_layers]:
            raise ValueError(f"values lack layers {missing}: they are of layers {sorted(value_layers)}")
        count = int(selection.chosen.sum())
        for layer in layers:
            shape = tuple(self.values[layer].shape)
            if shape not in ((width,), (count, width)):
                raise ValueError(
                    f"values of layer {layer} have shape {list(shape)}: to patch {count} positions of width {width}, "
                    f"they must have shape [{count}, {width}] or [{width}]"
                )
            if not (finite := self.values[layer].isfinite().all(-1).reshape(-1)).all():
                raise ValueError(
                    f"values of layer {layer}: row {int(finite.int().argmin())} is not finite; "
                    "leave out tokens that were dropped"
                )


class _AddedFeatures:
    """The image features that the current call adds to visual tokens after its first layers (DeepStack).

    They are those of the call's own image, so patched states would not be the given ones.
    """

    def __init__(self) -> None:
        self.layers = 0
        self.visual: Bool[Tensor, "batch queries"] | None = None

    def before_call(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the features off the arguments of a decoder call."""
        self.layers, self.visual = len(kwargs.get("deepstack_visual_embeds") or ()), kwargs.get("visual_pos_masks")

    def refuse(self, layer: int, patched: Bool[Tensor, "batch queries"]) -> None:
        """Raise a ValueError if features are added to patched states after this layer."""
        if layer < self.layers and self.visual is not None and (patched & self.visual.to(patched.device)).any():
            raise ValueError(
                f"layers: the model adds image features to visual tokens after layer {layer} (DeepStack), so a patch there "
                f"would not replace them; patch layers from {self.layers} on, or use swap_images"
            )


class _LayerPatch:
    """The forward hook of `PatchActivations` on one layer or a part of it."""

    def __init__(
        self,
        number: int,
        layer: nn.Module,
        window: TokenWindow,
        selection: TokenSelection,
        spec: PatchActivations,
        effect: Effect,
        added: _AddedFeatures,
    ) -> None:
        self.number, self.layer, self.window, self.selection = number, layer, window, selection
        self.spec, self.effect, self.added = spec, effect, added
        self.values = None if isinstance(spec.values, str) else spec.values[number]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Return the output with the activations replaced; None to leave it as it is."""
        window = self.window
        if not acts_in_current_call(window, self.spec.when):
            return None
        hidden, so_far = output_states(output), self.selection.so_far
        if self.values is not None and self.values.ndim == 2:
            so_far = so_far & (torch.arange(window.stop, device=so_far.device) < window.tokens.labels.shape[1])
        # A layer's own output covers the whole sequence again by now; the outputs of its parts do not.
        subset = None if self.spec.component == "residual" else current_subset(self.layer)
        chosen, ordinal = so_far[:, window.start :], (so_far.cumsum(dim=1) - 1)[:, window.start :]
        if subset is not None:
            chosen = subset.select_queries(chosen) & ~subset.to(chosen.device).query_filler
            ordinal = subset.select_queries(ordinal)
        chosen, ordinal = chosen.to(hidden.device), ordinal.clamp(min=0).to(hidden.device)
        if not chosen.any():
            return None
        if self.spec.component == "residual":
            self.added.refuse(self.number, chosen)
        self.effect.add(self.number, int(chosen.sum()))
        values = self._new_values(hidden, chosen, ordinal)
        return replace_output_states(output, torch.where(chosen[..., None], values.to(hidden.dtype), hidden))

    def _new_values(
        self,
        hidden: Float[Tensor, "batch queries width"],
        chosen: Bool[Tensor, "batch queries"],
        ordinal: Int[Tensor, "batch queries"],
    ) -> Tensor:
        """Return the values to put in. They have no meaning for queries that are not chosen.

        Args:
            hidden: The activations.
            chosen: Which queries are patched.
            ordinal: Index of each query among the chosen tokens of its sample.
        """
        if self.values is not None:
            values = self.values.to(hidden.device)
            if values.ndim == 1:
                return values.expand_as(hidden)
            counts = self.selection.chosen.sum(dim=1)
            first = (counts.cumsum(dim=0) - counts)[self.window.rows].repeat_interleave(self.window.copies)
            return values[(first.to(hidden.device)[:, None] + ordinal).clamp(max=len(values) - 1)]
        if self.spec.values == "zero":
            return torch.zeros_like(hidden)
        if self.spec.values == "mean":
            member = chosen[..., None].float()
            return (hidden.float() * member).sum(dim=1, keepdim=True) / member.sum(dim=1, keepdim=True).clamp(min=1)
        return hidden.float() + self._noise(int(ordinal.max()) + 1, hidden.shape[-1]).to(hidden.device)[ordinal]

    def _noise(self, count: int, width: int) -> Float[Tensor, "count width"]:
        """Return the noise of the first `count` tokens in this layer and component.

        It is drawn on the CPU, to be the same on every device.
        """
        offset = self.number * len(COMPONENTS) + COMPONENTS.index(self.spec.component)
        generator = torch.Generator().manual_seed((self.spec.seed << 16) + offset)
        noise = torch.randn(count, -(-width // _NOISE_BLOCK) * _NOISE_BLOCK, generator=generator)
        return noise[:, :width] * self.spec.std
