"""SparseVLM: text tokens rate the visual tokens, and a part of the dropped ones is recycled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from probes.hooks.decoder import decoder_layers, find_decoder
from probes.hooks.layer_io import component_module, input_states, output_states, replace_output_states
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
from probes.pruning.received_attention import ReceivedAttention
from probes.pruning.token_recycling import recycle_tokens
from probes.tokens.token_map import TokenMap

RECYCLED_POOL = 0.3
"""Share of the dropped tokens, those of highest score, that is clustered."""
CLUSTER_SHARE = 0.1
"""Clusters as a share of the clustered tokens."""


@contextmanager
def sparsevlm(
    model: PreTrainedModel,
    tokens: TokenMap,
    layers: Sequence[int],
    keep: float | Literal["rank"],
    how: RemovalMode = "drop",
    positions: PositionMode = "keep",
) -> Iterator[Receipt]:
    """Keep the visual tokens that relevant text attends to, at each of `layers` (SparseVLM, Zhang et al. 2024).

    Source: arXiv 2410.04417; Gumpest/SparseVLMs.

    - Raters are the question tokens t of above-average relevance, `mean over visual v of softmax_t(h_v . h_t)`, with h
      the input of the first layer.
    - P is the attention from raters to the remaining visual tokens in the layer before, mean over heads. A visual
      token's score is its mean over the raters.
    - The number of tokens that stay is the share `keep ** i` of all at the i-th layer. `keep="rank"` derives it from the
      attention: `L - (L - rank P) = rank P` of L tokens stay, the paper's rule with its factor 1.
    - The 30% of the dropped tokens with the highest scores are clustered, about ten to a cluster, and each cluster is
      summed into one token, which stays (`recycle_tokens`). Recycled tokens count among those that stay.

    Departures: a recycled token has the position of its cluster's centre, where the released code appends it to the
    visual tokens and renumbers them. That code keeps fixed numbers of tokens after layers 2, 6 and 15 of 32: 300, 200
    and 110 of 576 tokens, for an average of 192.

    Args:
        model: A transformers model with a decoder.
        tokens: Map of the inputs that the model will be called with.
        layers: Layers where tokens are dropped, ascending, from 1.
        keep: Share to keep at each of the layers, from 0 to below 1, numbers of tokens rounded down; or "rank".
        how: "drop" runs the layers without the tokens, "mask" hides them; see `RemoveTokens`.
        positions: "keep" the position ids of the remaining tokens or "renumber" them.

    Yields:
        The receipt, with one effect for each of `layers`.

    Raises:
        ValueError: `layers` are not ascending from 1, a layer is outside the model, `keep` is not in 0 to below 1, or
            the decoder has several residual streams.

    Example:
        >>> from probes.pruning import sparsevlm
        >>> with sparsevlm(model, tokens, layers=[2, 4], keep=0.5) as receipt:
        ...     logits = model(**inputs).logits
        >>> [int(effect.chosen.sum()) for effect in receipt]  # removed, of 36
        [18, 27]
    """
    decoder = find_decoder(model, tokens.stack)
    starts = check_layers(decoder, layers)
    if keep != "rank":
        check_share(keep)
    ends = [*starts[1:], len(decoder_layers(decoder))]
    window = TokenWindow(decoder, tokens)
    vision = TokenSelection(window, "vision")
    with ExitStack() as stack:
        stack.enter_context(window)
        raters = _Raters(decoder, window, vision, TokenSelection(window, question_tokens(tokens)), stack)
        stages: list[_Stage] = []
        for number, start in enumerate(starts, 1):
            share = None if keep == "rank" else keep**number
            previous = stages[-1] if stages else None
            stages.append(_Stage(decoder, window, start - 1, vision, raters, previous, share, stack))
        removals = [
            RemoveTokens(stage.removed_tokens, range(start, end), how=how, positions=positions)
            for stage, start, end in zip(stages, starts, ends, strict=True)
        ]
        yield stack.enter_context(intervene(model, tokens, *removals))


def relevant_text(
    states: Float[Tensor, "batch positions width"],
    vision: Bool[Tensor, "batch positions"],
    question: Bool[Tensor, "batch positions"],
) -> Bool[Tensor, "batch positions"]:
    """Return the raters: the question tokens whose relevance to the visual tokens is at least its mean.

    Args:
        states: Input of the first layer.
        vision: The visual tokens.
        question: The text tokens that may be raters.
    """
    relevance = torch.zeros(question.shape, device=states.device)
    for row, row_states in enumerate(states.float()):  # a prompt at a time: only visual rows and question columns count
        attention = (row_states[vision[row]] @ row_states[question[row]].T).softmax(dim=-1)
        relevance[row, question[row]] = attention.sum(dim=0)
    mean = relevance.sum(dim=1, keepdim=True) / question.sum(dim=1, keepdim=True).clamp(min=1)
    return question & (relevance >= mean)


class _Raters:
    """The text tokens that rate the visual tokens of the current prompt."""

    def __init__(
        self,
        decoder: PreTrainedModel,
        window: TokenWindow,
        vision: TokenSelection,
        question: TokenSelection,
        stack: ExitStack,
    ) -> None:
        self.window, self.vision, self.question = window, vision, question
        self.mask: Bool[Tensor, "batch positions"]
        first = component_module(decoder_layers(decoder)[0], "residual")
        stack.callback(first.register_forward_pre_hook(self.choose, with_kwargs=True, prepend=True).remove)

    def choose(self, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Choose the raters by the input of the first layer."""
        if acts_in_current_call(self.window, "prefill"):
            states = input_states(args, kwargs).detach()
            self.mask = relevant_text(
                states, self.vision.so_far.to(states.device), self.question.so_far.to(states.device)
            )


class _RaterAttention(ReceivedAttention):
    """Attention from the raters in one layer, as scores and as a matrix."""

    def select_queries(self) -> Bool[Tensor, " queries"] | None:
        """Begin a call of the layer, and return the queries to watch."""
        self.matrix: list[Float[Tensor, "batch rows positions"]] = []
        return super().select_queries()

    def add(self, rows: Int[Tensor, " rows"], weights: Float[Tensor, "batch heads rows keys"]) -> None:
        """Add the attention weights of some queries to the scores, and keep them."""
        super().add(rows, weights)
        members = self.members[:, rows.to(self.members.device)].to(weights)
        mean = (weights.mean(dim=1) * members[..., None]).to(self.scores.device)
        if self.keys is None:
            mean = mean[..., : self.scores.shape[1]]
        else:
            whole = mean.new_zeros(*mean.shape[:2], self.scores.shape[1])
            mean = whole.scatter_add(2, self.keys[:, None].expand_as(mean), mean)
        self.matrix.append(mean)

    def rank(self, among: Bool[Tensor, "batch positions"]) -> Int[Tensor, "batch 1"]:
        """Return the rank of the matrix from raters to some positions."""
        if not self.matrix:
            return among.sum(dim=1, keepdim=True) * 0
        matrix = torch.cat(self.matrix, dim=1) * among[:, None, :]
        # On the CPU: the rank counts singular values, and MPS has no such decomposition.
        return torch.linalg.matrix_rank(matrix.cpu())[:, None].to(among.device)


class _Stage:
    """One layer after which tokens are dropped: chooses them and writes the recycled tokens into its output."""

    def __init__(
        self,
        decoder: PreTrainedModel,
        window: TokenWindow,
        layer: int,
        vision: TokenSelection,
        raters: _Raters,
        previous: _Stage | None,
        share: float | None,
        stack: ExitStack,
    ) -> None:
        self.window, self.vision, self.previous, self.share = window, vision, previous, share
        self.removed: Bool[Tensor, "batch positions"]
        self.attention = _RaterAttention(decoder, window, layer, lambda: raters.mask, stack)
        module = component_module(decoder_layers(decoder)[layer], "residual")
        stack.callback(module.register_forward_hook(self.drop).remove)

    def removed_tokens(self) -> Bool[Tensor, "batch positions"]:
        """Return the tokens that are dropped so far."""
        return self.removed

    def drop(self, layer: nn.Module, args: Any, output: Any) -> Any:
        """Choose the tokens to drop, and return the layer's output with recycled tokens."""
        if not acts_in_current_call(self.window, "prefill"):
            return None
        states = output_states(output)
        vision, scores = self.vision.so_far.to(states.device), self.attention.scores.to(states.device)
        remaining = vision if self.previous is None else vision & ~self.previous.removed.to(states.device)
        left = remaining.sum(dim=1, keepdim=True)
        if self.share is None:
            count = torch.minimum(self.attention.rank(remaining.to(scores.device)), left)
        else:
            count = count_kept_tokens(vision.sum(dim=1, keepdim=True), self.share).to(states.device)
        recycled = _recycled_count(left, count)
        rank = scores.masked_fill(~remaining, -torch.inf).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        kept = remaining & (rank < count - recycled)
        pool_size = torch.maximum(((left - count + recycled) * RECYCLED_POOL).floor().long(), recycled)
        pool = remaining & ~kept & (rank < count - recycled + pool_size)
        states, centres = recycle_tokens(states, pool, recycled)
        self.removed = vision & ~kept & ~centres
        return replace_output_states(output, states)


def _recycled_count(left: Int[Tensor, "batch 1"], count: Int[Tensor, "batch 1"]) -> Int[Tensor, "batch 1"]:
    """Return how many of the `count` tokens that stay are recycled ones: none if one or all of `left` tokens stay."""
    wanted = ((left - count) * RECYCLED_POOL * CLUSTER_SHARE).round().long().clamp(min=1)
    return torch.where((count > 1) & (count < left), torch.minimum(wanted, count - 1), 0)
