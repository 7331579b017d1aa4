"""Changes what some decoder layers see, and accounts for every change in a receipt."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformers import PreTrainedModel

from probes.decoder import TokenWindow, decoder_layers, find_decoder, select_layers
from probes.tokens import TokenMap


@dataclass(frozen=True)
class RemoveTokens:
    """Takes the tokens of `group` out of `layers`, as if they were physically dropped there with position ids kept.

    In these layers no other position can attend to them, also from later decoding steps, and their own hidden states
    pass unchanged, so they are back after the last of the layers. LLaVA-Mini's Figure 5 drops vision tokens in blocks
    of four layers but does not say whether they come back: `range(a, b)` removes them inside the block, `range(a, n)`
    from layer a onward.

    Args:
        group: A group of the token map.
        layers: Decoder layers, from 0; none is a no-op.
    """

    group: str
    layers: Collection[int]


@dataclass
class Receipt:
    """What an intervention did, by decoder layer.

    Attributes:
        calls: In how many forward calls of the layer at least one of its keys was taken away.
        tokens: How many tokens were taken around the layer, over all samples and calls.
    """

    calls: dict[int, int] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)


@contextmanager
def intervene(model: PreTrainedModel, tokens: TokenMap, intervention: RemoveTokens) -> Iterator[Receipt]:
    """Intervenes in all forward calls of the model inside the block: a prompt, or a prompt and its cached decoding.

    Composes with `record_attention` in either order: recorded queries do not see a removed source, so their mass on it
    is NaN in these layers, and removed tokens are no queries there.

    Args:
        model: A transformers model whose decoder runs sdpa or eager attention.
        tokens: Map of the inputs that the model will be called with.
        intervention: What to do, where.

    Raises:
        ValueError: An unknown layer or group, a model that cannot be probed, or a call that `tokens` do not fit.
        RuntimeError: On leaving, a layer in which nothing was removed, unless an exception is on its way already.
    """
    decoder = find_decoder(model)
    layers = select_layers(decoder, intervention.layers)
    receipt = Receipt(dict.fromkeys(layers, 0), dict.fromkeys(layers, 0))
    window = TokenWindow(decoder, tokens)
    removal = _Removal(decoder, window, tokens.index(intervention.group), receipt)
    with ExitStack() as stack:
        if layers:
            stack.enter_context(window)
        for layer in layers:
            module = decoder_layers(decoder)[layer]
            stack.callback(module.register_forward_pre_hook(removal.hide, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(removal.bypass, with_kwargs=True).remove)
        yield receipt
    unfired = [layer for layer, calls in receipt.calls.items() if not calls]
    if unfired:
        raise RuntimeError(f"no token of {intervention.group!r} was removed in layers {unfired}: did the model run?")


class _Removal:
    """The forward hooks of `RemoveTokens` on a decoder's layers."""

    def __init__(self, decoder: PreTrainedModel, window: TokenWindow, group: int, receipt: Receipt) -> None:
        self.layer_of = {module: layer for layer, module in enumerate(decoder_layers(decoder))}
        self.window, self.group, self.receipt = window, group, receipt

    def hide(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        """Before the layer: takes the group out of the attention mask, as queries and as keys."""
        hidden_states, mask = _hidden_states(args, kwargs), kwargs["attention_mask"]
        queries = hidden_states.shape[1]
        if mask is not None:
            keys = mask.shape[-1]
        elif (cache := kwargs.get("past_key_values")) is not None:
            keys, _ = cache.get_mask_sizes(queries, layer.get_submodule("self_attn").layer_idx)
        else:
            keys = queries
        removed = self.window.keys(keys) == self.group
        if not removed.any():
            return None
        number = self.layer_of[layer]
        self.receipt.calls[number] += 1
        self.receipt.tokens[number] += int((self.window.queries == self.group).sum())

        if mask is None:
            mask = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=hidden_states.device)
            if queries > 1 and getattr(layer.self_attn, "is_causal", True):
                mask = mask.tril()  # what sdpa does without a mask
        blocked = removed[:, None, None, :] | (self.window.queries == self.group)[:, None, :, None]
        return args, kwargs | {"attention_mask": _block(mask, blocked, hidden_states.dtype)}

    def bypass(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """After the layer: gives the removed positions back the hidden states they came with."""
        removed = (self.window.queries == self.group)[..., None]
        if isinstance(output, tuple):
            return torch.where(removed, _hidden_states(args, kwargs), output[0]), *output[1:]
        return torch.where(removed, _hidden_states(args, kwargs), output)


def _hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _block(mask: Tensor, blocked: Bool[Tensor, "batch 1 queries keys"], dtype: torch.dtype) -> Tensor:
    """`mask` in its additive form, which eager attention needs too, with the least number where `blocked`.

    The least number rather than -inf: a row with every key blocked stays finite.
    """
    least = torch.finfo(dtype).min
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, least)
    return mask.masked_fill(blocked, least)
