"""FastV, VTW and PyramidDrop: methods that drop visual tokens inside the language model, built on `RemoveTokens`.

They are context managers around forward calls or `generate`, and need no training. They yield the receipt of their
removals; `receipt[i].chosen` marks the removed positions. Layers are numbered from 0. A method that drops "after layer
k" of its paper gets `layer=k`, the first layer that runs without the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from probes.attention.kernel_watch import KernelWatch
from probes.hooks.decoder import decoder_layers, find_decoder, select_layers
from probes.hooks.partial_call import current_subset
from probes.hooks.token_window import TokenWindow
from probes.interventions import Receipt, RemoveTokens, intervene
from probes.interventions.selection import TokenSelection, acts_in_current_call
from probes.tokens.token_map import TokenMap

RemovalMode = Literal["mask", "drop"]
PositionMode = Literal["keep", "renumber"]


def vtw(
    model: PreTrainedModel, tokens: TokenMap, layer: int, how: RemovalMode = "drop", positions: PositionMode = "keep"
) -> AbstractContextManager[Receipt]:
    """Remove all visual tokens from `layer` on (visual tokens withdrawal, Lin et al. 2024).

    Args:
        model: A transformers model with a decoder.
        tokens: Map of the inputs that the model will be called with.
        layer: First layer without visual tokens, from 0.
        how: "drop" runs the layers without the tokens, "mask" hides them; see `RemoveTokens`.
        positions: "keep" the position ids of the remaining tokens or "renumber" them. The released code of VTW has
            this option too.

    Returns:
        Context manager that yields the receipt, with one effect.

    Raises:
        ValueError: The layer is outside the model.

    Example:
        >>> with vtw(model, tokens, layer=3) as receipt:
        ...     logits = model(**inputs).logits
        >>> int(receipt[0].chosen.sum())
        36
    """
    last = len(decoder_layers(find_decoder(model, tokens.stack)))
    return intervene(model, tokens, RemoveTokens("vision", range(layer, last), how=how, positions=positions))


def fastv(
    model: PreTrainedModel,
    tokens: TokenMap,
    layer: int,
    keep: float,
    queries: Literal["last", "all"] = "last",
    how: RemovalMode = "drop",
    positions: PositionMode = "keep",
) -> AbstractContextManager[Receipt]:
    """Keep only the most attended visual tokens from `layer` on (FastV, Chen et al. 2024).

    Tokens are ranked by the attention they receive in layer `layer - 1`, mean over heads. `queries="last"` ranks by the
    last token of the prompt, as the released code does. `queries="all"` sums over the whole prompt, as the paper says.

    Args:
        model: A transformers model with a decoder.
        tokens: Map of the inputs that the model will be called with.
        layer: First layer without the removed tokens, at least 1.
        keep: Share of the visual tokens to keep, from 0 to below 1; the number of tokens is rounded down.
        queries: Tokens whose attention ranks: "last" or "all".
        how: "drop" runs the layers without the tokens, "mask" hides them; see `RemoveTokens`.
        positions: "keep" the position ids of the remaining tokens or "renumber" them.

    Returns:
        Context manager that yields the receipt, with one effect.

    Raises:
        ValueError: `layer` is 0 or outside the model, or `keep` is not in 0 to below 1.

    Example:
        >>> with fastv(model, tokens, layer=2, keep=0.25) as receipt:
        ...     logits = model(**inputs).logits
        >>> int(receipt[0].chosen.sum())  # removed, of 36
        27
    """
    return pyramid_drop(model, tokens, [layer], keep, queries, how, positions)


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
    starts = select_layers(decoder, layers)
    if not starts or list(layers) != list(starts) or starts[0] == 0:
        raise ValueError(
            f"layers {list(layers)} cannot drop by the attention of the layer before: name ascending layers from 1 on"
        )
    if not 0 <= keep < 1:
        raise ValueError(f"keep={keep} does not drop anything: it must be a share from 0 to below 1")
    ends = [*starts[1:], len(decoder_layers(decoder))]
    window = TokenWindow(decoder, tokens)
    ranking_queries = _ranking_queries(tokens, queries)
    dropped = _DroppedTokens(TokenSelection(window, "vision"))
    with ExitStack() as stack:
        stack.enter_context(window)
        removals = []
        for stage, (start, end) in enumerate(zip(starts, ends, strict=True)):
            received = _ReceivedAttention(decoder, window, start - 1, ranking_queries, stack)

            def least_attended(stage: int = stage, received: _ReceivedAttention = received) -> Tensor:
                return dropped.keep_most_attended(keep ** (stage + 1), received.scores, first=stage == 0)

            removals.append(RemoveTokens(least_attended, range(start, end), how=how, positions=positions))
        yield stack.enter_context(intervene(model, tokens, *removals))


def count_kept_tokens(counts: Int[Tensor, "*rows"], keep: float) -> Int[Tensor, "*rows"]:
    """Return the share `keep` of each number of tokens, rounded down.

    Computed on the CPU in double precision: in single precision 1/3 of 9 may be less than 3.
    """
    return (counts.cpu().double() * keep + 1e-6).floor().long()


def _ranking_queries(tokens: TokenMap, queries: str) -> Bool[Tensor, "batch positions"]:
    """Return the prompt positions whose attention ranks the visual tokens.

    Padding does not rank. Neither does the response, which does not exist yet when tokens are chosen.
    """
    if queries not in ("last", "all"):
        raise ValueError(f"unknown queries={queries!r}: it must be 'last' or 'all'")
    prompt = tokens.labels != tokens.index(tokens.generated)
    if "pad" in tokens.groups:
        prompt &= ~tokens.mask("pad")
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


class _ReceivedAttention:
    """Attention that each position receives from the ranking queries in one layer: sum over queries, mean over heads."""

    def __init__(
        self, decoder: PreTrainedModel, window: TokenWindow, layer: int, ranking_queries: Tensor, stack: ExitStack
    ) -> None:
        self.layer, self.window = decoder_layers(decoder)[layer], window
        self.ranking_queries = TokenSelection(window, ranking_queries)
        KernelWatch(self.layer.get_submodule("self_attn"), self.select_queries, self.add).install(stack)

    def select_queries(self) -> Bool[Tensor, " queries"] | None:
        """Begin a call of the layer, and return the queries to watch; None after the prompt."""
        if not acts_in_current_call(self.window, "prefill"):
            return None
        self.members, subset = self.ranking_queries.queries, current_subset(self.layer)
        self.keys: Int[Tensor, "batch keys"] | None = None
        if subset is not None:
            self.members, self.keys = subset.select_queries(self.members) & ~subset.query_filler, subset.keys
        self.scores = torch.zeros(self.window.labels.shape, device=self.members.device)
        return self.members.any(dim=0)

    def add(self, rows: Int[Tensor, " rows"], weights: Float[Tensor, "batch heads rows keys"]) -> None:
        """Add the attention weights of some queries to the scores."""
        members = self.members[:, rows.to(self.members.device)].to(weights)
        received = torch.einsum("bq,bhqk->bk", members, weights).div(weights.shape[1]).to(self.scores.device)
        if self.keys is None:
            self.scores += received[:, : self.scores.shape[1]]
        else:
            self.scores.scatter_add_(1, self.keys, received)
