"""PyramidDrop: at each of several layers, the most attended of the remaining visual tokens stay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from probes.hooks.decoder import decoder_layers, find_decoder
from probes.hooks.token_window import TokenWindow
from probes.interventions import Receipt, RemoveTokens, intervene
from probes.interventions.selection import TokenSelection
from probes.pruning.kept_tokens import (
    PositionMode,
    RemovalMode,
    check_layers,
    check_share,
    count_kept_tokens,
    prompt_tokens,
)
from probes.pruning.received_attention import ReceivedAttention
from probes.tokens.token_map import TokenMap


@contextmanager
def pyramid_drop(
    model: PreTrainedModel,
    tokens: TokenMap,
    layers: Sequence[int],
    keep: float = 0.5,
    queries: Literal["last", "all"] = "last",
    how: RemovalMode = "drop",
    positions: PositionMode = "keep",
) -> Iterator[Receipt]:
    """Keep the share `keep ** i` of the visual tokens from the i-th of `layers` on (PyramidDrop, Xing et al. 2024).

    The tokens that stay receive the most attention from the last token of the prompt in the layer before, mean over
    heads. (The released code ranks by the weights that the layer after the drop would have.) The paper drops at layers
    8, 16 and 24 of 32, and halves the tokens each time.

    Args:
        model: A transformers model with a decoder.
        tokens: Map of the inputs that the model will be called with.
        layers: Layers where tokens are dropped, ascending, from 1.
        keep: Share to keep at each of the layers, from 0 to below 1; numbers of tokens are rounded down.
        queries: Tokens whose attention ranks: "last" or "all" of the prompt.
        how: "drop" runs the layers without the tokens, "mask" hides them; see `RemoveTokens`.
        positions: "keep" the position ids of the remaining tokens or "renumber" them.

    Yields:
        The receipt, with one effect for each of `layers`.

    Raises:
        ValueError: `layers` are not ascending from 1, a layer is outside the model, or `keep` is not in 0 to below 1.

    Example:
        >>> with pyramid_drop(model, tokens, layers=[2, 4]) as receipt:
        ...     logits = model(**inputs).logits
        >>> [int(effect.chosen.sum()) for effect in receipt]  # removed, of 36
        [18, 27]
    """
    decoder = find_decoder(model, tokens.stack)
    starts = check_layers(decoder, layers)
    check_share(keep)
    ends = [*starts[1:], len(decoder_layers(decoder))]
    window = TokenWindow(decoder, tokens)
    ranking_queries = _ranking_queries(tokens, queries)
    dropped = _DroppedTokens(TokenSelection(window, "vision"))
    with ExitStack() as stack:
        stack.enter_context(window)
        removals = []
        for stage, (start, end) in enumerate(zip(starts, ends, strict=True)):
            received = ReceivedAttention(decoder, window, start - 1, ranking_queries, stack)

            def least_attended(stage: int = stage, received: ReceivedAttention = received) -> Tensor:
                return dropped.keep_most_attended(keep ** (stage + 1), received.scores, first=stage == 0)

            removals.append(RemoveTokens(least_attended, range(start, end), how=how, positions=positions))
        yield stack.enter_context(intervene(model, tokens, *removals))


def _ranking_queries(tokens: TokenMap, queries: str) -> Bool[Tensor, "batch positions"]:
    """Return the prompt positions whose attention ranks the visual tokens."""
    if queries not in ("last", "all"):
        raise ValueError(f"unknown queries={queries!r}: it must be 'last' or 'all'")
    prompt = prompt_tokens(tokens)
    if queries == "all":
        return prompt
    return prompt & (prompt.flip(1).cumsum(dim=1).flip(1) == 1)


class _DroppedTokens:
    """Visual tokens that were dropped so far in the current prompt."""

    def __init__(self, vision: TokenSelection) -> None:
        self.vision = vision
        self.dropped: Bool[Tensor, "batch positions"]

    def keep_most_attended(
        self, keep: float, scores: Float[Tensor, "batch positions"], first: bool
    ) -> Bool[Tensor, "batch positions"]:
        """Drop all but the share `keep` of each row's visual tokens, and return all dropped tokens.

        The remaining tokens with the highest scores stay. `first` starts a new prompt.
        """
        vision = self.vision.so_far
        remaining = vision if first else vision & ~self.dropped
        count = count_kept_tokens(vision.sum(dim=1, keepdim=True), keep).to(vision.device)
        rank = scores.masked_fill(~remaining, -torch.inf).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        self.dropped = vision & ~(remaining & (rank < count))
        return self.dropped
