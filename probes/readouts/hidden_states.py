"""Keeps what leaves a decoder's layers, its attention or its MLPs, at chosen positions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from probes.hooks.decoder import decoder_layers, find_decoder, select_layers
from probes.hooks.layer_io import component_of, hidden_of
from probes.hooks.partial_call import cut_of
from probes.hooks.token_window import TokenWindow
from probes.tokens.token_map import TokenMap


class States:
    """Hidden states at chosen positions, by layer, in order of sample and position.

    Attributes:
        layers: Decoder layers that were kept, from 0.
        component: "residual", "attention" or "mlp".
        positions: Which positions of the token map were kept.
    """

    def __init__(self, layers: tuple[int, ...], component: str, positions: Bool[Tensor, "batch positions"]) -> None:
        self.layers, self.component, self.positions = layers, component, positions
        self._parts: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        self._places: dict[int, list[Tensor]] = {layer: [] for layer in layers}

    def __getitem__(self, layer: int) -> Float[Tensor, "kept width"]:
        """Of one layer. Raises KeyError for a layer that was not asked for, RuntimeError before a forward pass."""
        parts = self._parts[layer]
        places = torch.cat(self._places[layer]) if parts else torch.empty(0, 2)
        if len(places) != int(self.positions.sum()):
            raise RuntimeError("states were not recorded: no complete forward pass ran inside record_states")
        order = (places[:, 0] * self.positions.shape[1] + places[:, 1]).argsort()
        return torch.cat(parts)[order]

    @property
    def index(self) -> Int[Tensor, "kept 2"]:
        """Sample and position of each row of states."""
        return self.positions.nonzero()

    def _add(self, layer: int, window: TokenWindow, hidden: Tensor) -> None:
        if window.copies > 1:
            raise ValueError(f"states are of one row each: the model got every row {window.copies} times, as for beams")
        chosen = self.positions[window.rows, window.start : window.stop].to(hidden.device)
        self._parts[layer].append(hidden[:, : chosen.shape[1]][chosen].detach())
        first = chosen.new_tensor([window.rows.start, window.start], dtype=torch.long)
        self._places[layer].append(chosen.nonzero() + first)


@contextmanager
def record_states(
    model: PreTrainedModel,
    tokens: TokenMap,
    at: str | Bool[Tensor, "batch positions"],
    layers: Iterable[int] | None = None,
    component: str = "residual",
) -> Iterator[States]:
    """Keeps hidden states of one prompt, in one call or in several that share a cache; generated tokens are left out.

    Attention and MLP have no output, NaN, for tokens that an intervention drops from their layer.

    Args:
        model: A transformers model with a decoder.
        tokens: Map of the inputs that the model will be called with.
        at: A group of the map, or a mask of positions.
        layers: Decoder layers, from 0; all by default. Layer l's residual is `hidden_states[l + 1]` of transformers
            (before the final norm, which transformers applies to its last one).
        component: "residual", "attention" or "mlp".

    Raises:
        ValueError: An unknown layer, group or component, or a call that `tokens` do not fit.
    """
    decoder = find_decoder(model, tokens.stack)
    positions = tokens.mask(at) if isinstance(at, str) else at
    states = States(select_layers(decoder, layers), component, positions)
    window = TokenWindow(decoder, tokens)
    with ExitStack() as stack:
        stack.enter_context(window)
        for layer in states.layers:

            def keep(module: nn.Module, args: Any, output: Any, layer: int = layer) -> None:
                cut, hidden = cut_of(decoder_layers(decoder)[layer]), hidden_of(output)
                states._add(layer, window, hidden if cut is None else cut.whole(hidden))

            module = component_of(decoder_layers(decoder)[layer], component)
            stack.callback(module.register_forward_hook(keep).remove)
        yield states
