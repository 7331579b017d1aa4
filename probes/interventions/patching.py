"""Activation patching and ablation: what leaves a layer, its attention or its MLP, replaced at chosen positions."""

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
from probes.hooks.layer_io import COMPONENTS, component_of, hidden_of, with_hidden
from probes.hooks.partial_call import cut_of
from probes.hooks.token_window import TokenWindow
from probes.interventions.effects import Effect
from probes.interventions.selection import Selection, Tokens, When, acts, check_choice, check_when, describe
from probes.readouts.hidden_states import States

ABLATIONS = ("zero", "mean", "noise")
# Normal numbers come in blocks of this size: drawn by whole blocks, more of them begin with the same ones.
_BLOCK = 16


@dataclass(frozen=True, eq=False)
class PatchActivations:
    """Replaces activations at the tokens `at`, in `layers`.

    `values` are, with n the number of these tokens in the batch, in order of sample and position:

    - `States` of another run (activation patching, Vig et al. 2020; the restoring run of causal tracing, Meng et al.
      2022): of these layers and this component, recorded at n positions of any other token map. Tokens of the prompt
      only.
    - A mapping from layer to a tensor `[n, width]` or `[width]`, such as the mean over another run's states:
      `{layer: states[layer].mean(0) for layer in states.layers}`.
    - "zero": zeros.
    - "mean": the mean over the sample's own tokens `at` in this call, so that they no longer differ.
    - "noise": adds Gaussian noise of standard deviation `std` to what is there (the corrupted run of causal tracing).
      The j-th of these tokens gets the same noise in every sample, so a batch is the same as its rows.

    Args:
        at: Group of tokens, or a mask of positions.
        layers: Decoder layers, from 0; none is a no-op.
        component: "residual" (what leaves the layer), "attention" or "mlp" (what that part adds to the residual).
        values: What to put there.
        when: In which calls: the prompt's ("prefill"), those of cached steps after it ("decode"), or "both".
        std: Of the noise.
        seed: Of the noise.
    """

    at: Tokens
    layers: Collection[int]
    component: Literal["residual", "attention", "mlp"]
    values: States | Mapping[int, Tensor] | Literal["zero", "mean", "noise"]
    when: When = "both"
    std: float = 0.0
    seed: int = 0

    def install(self, decoder: PreTrainedModel, window: TokenWindow, stack: ExitStack) -> Effect:
        """Hooks the decoder until `stack` closes."""
        layers = select_layers(decoder, self.layers)
        selection = Selection(window, self.at)
        self._check(layers, selection, decoder.config.hidden_size)
        effect = Effect.of(f"PatchActivations({describe(self.at)}, {self.component})", layers)
        for number in layers:
            layer = decoder_layers(decoder)[number]
            patch = _Patch(number, layer, window, selection, self, effect)
            stack.callback(component_of(layer, self.component).register_forward_hook(patch).remove)
        return effect

    def _check(self, layers: tuple[int, ...], selection: Selection, width: int) -> None:
        check_when(self.when)
        if isinstance(self.values, str):
            check_choice("values", self.values, *ABLATIONS)
        if (isinstance(self.values, str) and self.values == "noise") != (self.std > 0):
            raise ValueError(f"std={self.std:g}: values='noise' need a positive std, and no others have one")
        if isinstance(self.values, str):
            return
        if isinstance(self.values, States) and self.values.component != self.component:
            raise ValueError(f"values are of component {self.values.component!r}, not {self.component!r}")
        known = self.values.layers if isinstance(self.values, States) else self.values
        if missing := [layer for layer in layers if layer not in known]:
            raise ValueError(f"values lack layers {missing}: they are of layers {sorted(known)}")
        count = int(selection.chosen.sum())
        for layer in layers:
            shape = tuple(self.values[layer].shape)
            if shape not in ((width,), (count, width)):
                raise ValueError(
                    f"values of layer {layer} have shape {list(shape)}: {count} positions of width {width} are patched, "
                    f"[{count}, {width}] or [{width}] is needed"
                )


class _Patch:
    """The forward hook of `PatchActivations` on one layer or a part of it."""

    def __init__(
        self,
        number: int,
        layer: nn.Module,
        window: TokenWindow,
        selection: Selection,
        spec: PatchActivations,
        effect: Effect,
    ) -> None:
        self.number, self.layer, self.window, self.selection = number, layer, window, selection
        self.spec, self.effect = spec, effect
        self.given = None if isinstance(spec.values, str) else spec.values[number]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        window = self.window
        if not acts(window, self.spec.when):
            return None
        hidden, so_far = hidden_of(output), self.selection.so_far
        if self.given is not None and self.given.ndim == 2:
            so_far = so_far & (torch.arange(window.stop, device=so_far.device) < window.tokens.labels.shape[1])
        # A layer's own output has been put back into the whole sequence by now, that of its parts has not.
        cut = None if self.spec.component == "residual" else cut_of(self.layer)
        chosen, ordinal = so_far[:, window.start :], (so_far.cumsum(dim=1) - 1)[:, window.start :]
        if cut is not None:
            chosen, ordinal = cut.rows(chosen) & ~cut.filler, cut.rows(ordinal)
        chosen, ordinal = chosen.to(hidden.device), ordinal.clamp(min=0).to(hidden.device)
        if not chosen.any():
            return None
        self.effect.add(self.number, int(chosen.sum()))
        values = self._values(hidden, chosen, ordinal)
        return with_hidden(output, torch.where(chosen[..., None], values.to(hidden.dtype), hidden))

    def _values(
        self,
        hidden: Float[Tensor, "batch queries width"],
        chosen: Bool[Tensor, "batch queries"],
        ordinal: Int[Tensor, "batch queries"],
    ) -> Tensor:
        """What to put in, of no meaning where a query is not chosen; `ordinal`: its place among the sample's chosen."""
        if self.given is not None:
            given = self.given.to(hidden.device)
            if given.ndim == 1:
                return given.expand_as(hidden)
            counts = self.selection.chosen.sum(dim=1)
            first = (counts.cumsum(dim=0) - counts)[self.window.rows].repeat_interleave(self.window.copies)
            return given[(first.to(hidden.device)[:, None] + ordinal).clamp(max=len(given) - 1)]
        if self.spec.values == "zero":
            return torch.zeros_like(hidden)
        if self.spec.values == "mean":
            member = chosen[..., None].float()
            return (hidden.float() * member).sum(dim=1, keepdim=True) / member.sum(dim=1, keepdim=True).clamp(min=1)
        return hidden.float() + self._noise(int(ordinal.max()) + 1, hidden.shape[-1]).to(hidden.device)[ordinal]

    def _noise(self, count: int, width: int) -> Float[Tensor, "count width"]:
        """The first `count` draws for this place in the model; on the CPU, to be the same everywhere."""
        place = self.number * len(COMPONENTS) + COMPONENTS.index(self.spec.component)
        generator = torch.Generator().manual_seed((self.spec.seed << 16) + place)
        noise = torch.randn(count, -(-width // _BLOCK) * _BLOCK, generator=generator)
        return noise[:, :width] * self.spec.std
