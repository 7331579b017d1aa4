"""Hidden states after a decoder's layers, attention blocks or MLPs, recorded at chosen positions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from probes.hooks.decoder import decoder_layers, find_decoder, select_layers
from probes.hooks.layer_io import component_module, input_states, layer_after_added_features, output_states
from probes.hooks.partial_call import current_subset
from probes.hooks.token_window import TokenWindow
from probes.tokens.position_mask import select_positions
from probes.tokens.token_map import TokenMap


class States:
    """Hidden states at chosen positions, by layer, in order of sample and position.

    `record_states` yields it.

    Attributes:
        layers: Decoder layers that were recorded, from 0.
        component: "residual", "attention" or "mlp".
        positions: Mask of the recorded positions of the token map.

    Example:
        >>> from probes import record_states
        >>> with torch.no_grad(), record_states(model, tokens, "vision", layers=[2]) as states:
        ...     output = model(**inputs)
        >>> states[2].shape, states.index[0].tolist()  # states, width; sample, position
        (torch.Size([36, 128]), [0, 0])
    """

    def __init__(self, layers: tuple[int, ...], component: str, positions: Bool[Tensor, "batch positions"]) -> None:
        self.layers, self.component, self.positions = layers, component, positions
        self._parts: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        # Sample and position of each row of the parts.
        self._part_indices: dict[int, list[Tensor]] = {layer: [] for layer in layers}

    def __getitem__(self, layer: int) -> Float[Tensor, "kept width"]:
        """Return the states of one layer.

        Args:
            layer: One of `layers`.

        Raises:
            KeyError: The layer was not recorded.
            RuntimeError: The model has not run the whole prompt inside `record_states`.
        """
        parts = self._parts[layer]
        indices = torch.cat(self._part_indices[layer]) if parts else torch.empty(0, 2)
        if len(indices) != int(self.positions.sum()):
            raise RuntimeError("states were not recorded: run a complete forward pass inside record_states")
        order = (indices[:, 0] * self.positions.shape[1] + indices[:, 1]).argsort()
        return torch.cat(parts)[order]

    @property
    def index(self) -> Int[Tensor, "kept 2"]:
        """Return sample and position of each row of states."""
        return self.positions.nonzero()

    def _add(self, layer: int, window: TokenWindow, hidden: Tensor) -> None:
        """Add the states of one call of one layer."""
        if window.copies > 1:
            raise ValueError(
                f"states need one row of the model for each row of the map: it got every row {window.copies} times, "
                "as for beams"
            )
        selected = self.positions[window.rows, window.start : window.stop].to(hidden.device)
        self._parts[layer].append(hidden[:, : selected.shape[1]][selected].detach())
        first = selected.new_tensor([window.rows.start, window.start], dtype=torch.long)
        self._part_indices[layer].append(selected.nonzero() + first)


@contextmanager
def record_states(
    model: PreTrainedModel,
    tokens: TokenMap,
    at: str | Bool[Tensor, "batch positions"],
    layers: Iterable[int] | None = None,
    component: str = "residual",
) -> Iterator[States]:
    """Record hidden states of one prompt, which may run in one call or in several that share a cache.

    Generated tokens are not recorded. Interventions act before recording, in whichever order the blocks are nested.
    Attention and MLP have no output for tokens that an intervention drops from their layer; the states there are NaN.

    Args:
        model: A transformers model with a decoder.
        tokens: Map of the inputs that the model will be called with.
        at: A group of the map, or a mask of positions `[batch, positions]`.
        layers: Decoder layers, from 0; all by default. The residual of layer l is `hidden_states[l + 1]` of
            transformers, before the final norm that transformers applies to the last of these. Where a model adds
            image features after a layer (DeepStack in Qwen3-VL), the residual has them.
        component: "residual" (the layer's output), "attention" or "mlp" (the output of that part of the layer).

    Yields:
        The states. They can be read once the model has run the whole prompt.

    Raises:
        ValueError: An unknown layer, group or component, a mask that is not bool or not of the map's shape, or a call that
            does not fit `tokens`.
        TypeError: Layers are no list of integers.

    Example:
        >>> from probes import record_states
        >>> with torch.no_grad(), record_states(model, tokens, "instruction") as states:
        ...     output = model(**inputs)
        >>> torch.stack([states[layer] for layer in states.layers]).shape  # layers, states, width
        torch.Size([6, 6, 128])
    """
    decoder = find_decoder(model, tokens.stack)
    states = States(select_layers(decoder, layers), component, select_positions(tokens, at))
    window = TokenWindow(decoder, tokens)
    handles: dict[int, RemovableHandle] = {}

    def come_last(*_: Any) -> None:
        """Register the hooks after those of interventions that have been opened since."""
        for layer in states.layers:

            def record(module: nn.Module, args: Any, output: Any, layer: int = layer) -> None:
                subset, hidden = current_subset(decoder_layers(decoder)[layer]), output_states(output)
                states._add(layer, window, hidden if subset is None else subset.scatter_to_call(hidden))

            def record_input(module: nn.Module, args: Any, kwargs: dict[str, Any], layer: int = layer) -> None:
                states._add(layer, window, input_states(args, kwargs))

            if layer in handles:
                handles[layer].remove()
            following = layer_after_added_features(decoder, layer) if component == "residual" else None
            if following is not None:  # before interventions that cut its input
                handles[layer] = following.register_forward_pre_hook(record_input, prepend=True, with_kwargs=True)
                continue
            module = component_module(decoder_layers(decoder)[layer], component)
            handles[layer] = module.register_forward_hook(record)

    with ExitStack() as stack:
        stack.callback(lambda: [handle.remove() for handle in handles.values()])
        come_last()
        stack.enter_context(window)
        stack.callback(decoder.register_forward_pre_hook(come_last).remove)
        yield states
