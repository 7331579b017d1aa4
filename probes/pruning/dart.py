"""DART: visual tokens that duplicate a few pivot tokens are dropped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from probes.hooks.decoder import decoder_layers, find_decoder
from probes.hooks.layer_io import component_module, output_states
from probes.hooks.token_window import TokenWindow
from probes.interventions import Receipt, RemoveTokens, intervene
from probes.interventions.selection import TokenSelection, acts_in_current_call
from probes.pruning.kept_tokens import (
    PositionMode,
    RemovalMode,
    check_layers,
    check_share,
    count_kept_tokens,
    question_tokens,
)
from probes.tokens.token_map import TokenMap

VISUAL_PIVOTS = TEXT_PIVOTS = 4
"""Pivot tokens of each kind, as in the released code."""


@contextmanager
def dart(
    model: PreTrainedModel,
    tokens: TokenMap,
    layer: int,
    keep: float,
    how: RemovalMode = "drop",
    positions: PositionMode = "keep",
) -> Iterator[Receipt]:
    """Keep pivot tokens and the visual tokens least similar to them from `layer` on (DART, Wen et al. 2025).

    Source: arXiv 2502.11494; ZichenWen1/DART.

    The pivots are the four visual tokens and the four question tokens of largest key norm in layer `layer - 1`. Visual
    pivots stay. Then the pivots take turns: each keeps its share of the visual tokens that are left, those of lowest
    cosine with it. The states are those between layers `layer - 1` and `layer`. Visual pivots come first, each kind in
    descending key norm; the first pivots keep one token more if the number does not divide.

    The norm is Euclidean, of all heads' keys before a key norm and the rotation of positions, which keeps lengths. The
    released code has the L1 norm after the rotation, and compares states after the model's last norm. Its pivots of one
    prompt take turns in no fixed order. The paper drops after layer 2 of 32, and keeps 192, 128 or 64 of 576 tokens.

    Args:
        model: A transformers model with a decoder.
        tokens: Map of the inputs that the model will be called with.
        layer: First layer without the removed tokens, at least 1.
        keep: Share of the visual tokens to keep, from 0 to below 1; the number of tokens is rounded down.
        how: "drop" runs the layers without the tokens, "mask" hides them; see `RemoveTokens`.
        positions: "keep" the position ids of the remaining tokens or "renumber" them.

    Yields:
        The receipt, with one effect.

    Raises:
        ValueError: `layer` is 0 or outside the model, `keep` is not in 0 to below 1, or the decoder has several residual
            streams or no key projection.

    Example:
        >>> from probes.pruning import dart
        >>> with dart(model, tokens, layer=2, keep=0.25) as receipt:
        ...     logits = model(**inputs).logits
        >>> int(receipt[0].chosen.sum())  # removed, of 36
        27
    """
    decoder = find_decoder(model, tokens.stack)
    check_layers(decoder, [layer])
    check_share(keep)
    window = TokenWindow(decoder, tokens)
    vision, question = TokenSelection(window, "vision"), TokenSelection(window, question_tokens(tokens))
    with ExitStack() as stack:
        stack.enter_context(window)
        before = _KeysAndStates(decoder_layers(decoder)[layer - 1], window, stack)

        def duplicates() -> Tensor:
            return removed_duplicates(before.states, before.key_norm, vision.so_far, question.so_far, keep)

        removal = RemoveTokens(duplicates, range(layer, len(decoder_layers(decoder))), how=how, positions=positions)
        yield stack.enter_context(intervene(model, tokens, removal))


def removed_duplicates(
    states: Float[Tensor, "batch positions width"],
    key_norm: Float[Tensor, "batch positions"],
    vision: Bool[Tensor, "batch positions"],
    question: Bool[Tensor, "batch positions"],
    keep: float,
) -> Bool[Tensor, "batch positions"]:
    """Return the visual tokens that DART drops.

    Args:
        states: Hidden states.
        key_norm: Norm of each position's keys.
        vision: The visual tokens.
        question: The text tokens that may be pivots.
        keep: Share of the visual tokens to keep.
    """
    vision, question = vision.to(states.device), question.to(states.device)
    count = count_kept_tokens(vision.sum(dim=1, keepdim=True), keep).to(states.device)
    visual_pivots, is_visual_pivot = _largest(key_norm, vision, count.clamp(max=VISUAL_PIVOTS), VISUAL_PIVOTS)
    text_pivots, is_text_pivot = _largest(
        key_norm, question, question.sum(dim=1, keepdim=True).clamp(max=TEXT_PIVOTS), TEXT_PIVOTS
    )
    kept = torch.zeros_like(vision).scatter(1, visual_pivots, is_visual_pivot)
    pivots, is_pivot = (
        torch.cat(parts, dim=1) for parts in ((visual_pivots, text_pivots), (is_visual_pivot, is_text_pivot))
    )
    share, more = _divide(count - is_visual_pivot.sum(dim=1, keepdim=True), is_pivot.sum(dim=1, keepdim=True))
    quotas = torch.where(is_pivot, share + (is_pivot.cumsum(dim=1) <= more), 0)
    directions = nn.functional.normalize(states.float(), dim=-1)
    for pivot, quota in zip(pivots.unbind(dim=1), quotas.unbind(dim=1), strict=True):
        cosine = (directions @ directions[torch.arange(len(pivot)), pivot][..., None])[..., 0]
        rank = cosine.masked_fill(~vision | kept, torch.inf).argsort(dim=1, stable=True).argsort(dim=1)
        kept = kept | (vision & ~kept & (rank < quota[:, None]))
    return vision & ~kept


def _largest(
    values: Float[Tensor, "batch positions"],
    among: Bool[Tensor, "batch positions"],
    count: Int[Tensor, "batch 1"],
    most: int,
) -> tuple[Int[Tensor, "batch most"], Bool[Tensor, "batch most"]]:
    """Return the positions of the largest values, and which of them are among the first `count` of their row."""
    order = values.masked_fill(~among, -torch.inf).argsort(dim=1, descending=True, stable=True)[:, :most]
    return order, torch.arange(order.shape[1], device=order.device) < count


def _divide(total: Int[Tensor, "batch 1"], parts: Int[Tensor, "batch 1"]) -> tuple[Tensor, Tensor]:
    """Return quotient and remainder; without parts, both are 0."""
    divisor = parts.clamp(min=1)
    return total.div(divisor, rounding_mode="floor"), total % divisor


class _KeysAndStates:
    """Key norms and output states of one layer in the current prompt."""

    def __init__(self, layer: nn.Module, window: TokenWindow, stack: ExitStack) -> None:
        self.window = window
        self.key_norm: Tensor
        self.states: Tensor
        try:
            keys = layer.get_submodule("self_attn.k_proj")
        except AttributeError:
            raise ValueError(
                f"{type(layer).__name__} has no self_attn.k_proj, whose output DART ranks tokens by"
            ) from None
        stack.callback(keys.register_forward_hook(self.read_keys).remove)
        stack.callback(component_module(layer, "residual").register_forward_hook(self.read_states).remove)

    def read_keys(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """Store the norm of all heads' keys at each position."""
        if acts_in_current_call(self.window, "prefill"):
            self.key_norm = output.detach().float().norm(dim=-1)

    def read_states(self, module: nn.Module, args: Any, output: Any) -> None:
        """Store the states of the whole sequence."""
        if acts_in_current_call(self.window, "prefill"):
            self.states = output_states(output).detach()
