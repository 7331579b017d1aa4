"""Three ways to drop visual tokens inside the language model, each a few lines on top of `RemoveTokens`.

They run as context managers around forward calls or `generate`, need no training, and yield the receipt of their
removals; `receipt[i].chosen` are the positions that were taken out. Layers are numbered from 0: a method that works
"after layer k" of its paper gets `layer=k`, the first layer that runs without the tokens.
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
from probes.hooks.partial_call import cut_of
from probes.hooks.token_window import TokenWindow
from probes.interventions import Receipt, RemoveTokens, intervene
from probes.interventions.selection import Selection, acts
from probes.tokens.token_map import TokenMap

How = Literal["mask", "drop"]
Positions = Literal["keep", "renumber"]


def vtw(
    model: PreTrainedModel, tokens: TokenMap, layer: int, how: How = "drop", positions: Positions = "keep"
) -> AbstractContextManager[Receipt]:
    """Visual tokens withdrawal (Lin et al. 2024): none of them from `layer` on.

    The released code has a switch for the positions of the tokens that stay.
    """
    last = len(decoder_layers(find_decoder(model, tokens.stack)))
    return intervene(model, tokens, RemoveTokens("vision", range(layer, last), how=how, positions=positions))


def fastv(
    model: PreTrainedModel,
    tokens: TokenMap,
    layer: int,
    keep: float,
    queries: Literal["last", "all"] = "last",
    how: How = "drop",
    positions: Positions = "keep",
) -> AbstractContextManager[Receipt]:
    """FastV (Chen et al. 2024): from `layer` on, the share `keep` of the visual tokens that got most attention before.

    Ranked by the attention that layer `layer - 1` pays them, mean over heads: of the prompt's last token, as the
    released code does, or summed over all of the prompt, as the paper's text says.

    Raises:
        ValueError: `layer` is 0 or outside the model, or `keep` is not in 0 to below 1.
    """
    return pyramid_drop(model, tokens, [layer], keep, queries, how, positions)


@contextmanager
def pyramid_drop(
    model: PreTrainedModel,
    tokens: TokenMap,
    layers: Sequence[int],
    keep: float = 0.5,
    queries: Literal["last", "all"] = "last",
    how: How = "drop",
    positions: Positions = "keep",
) -> Iterator[Receipt]:
    """PyramidDrop (Xing et al. 2024): from the i-th of `layers` on, the share `keep ** i` of the visual tokens.

    Those that stay are the ones that the prompt's last token pays most attention to, mean over heads, in the last layer
    before. (The released code ranks by the weights that the first layer after would have.) The paper cuts 32 layers at
    8, 16 and 24, and halves each time. Numbers of tokens are rounded down.

    Raises:
        ValueError: `layers` are not ascending from 1 on, or outside the model, or `keep` is not in 0 to below 1.
    """
    decoder = find_decoder(model, tokens.stack)
    starts = select_layers(decoder, layers)
    if not starts or list(layers) != list(starts) or starts[0] == 0:
        raise ValueError(
            f"layers {list(layers)} cannot drop by the attention before them: name ascending ones, from 1 on"
        )
    if not 0 <= keep < 1:
        raise ValueError(f"keep={keep} is no share that drops anything: it lies in 0 to below 1")
    ends = [*starts[1:], len(decoder_layers(decoder))]
    window = TokenWindow(decoder, tokens)
    asking, gone = _asking(tokens, queries), _Gone(Selection(window, "vision"))
    with ExitStack() as stack:
        stack.enter_context(window)
        removals = []
        for stage, (start, end) in enumerate(zip(starts, ends, strict=True)):
            received = _Received(decoder, window, start - 1, asking, stack)

            def least_attended(stage: int = stage, received: _Received = received) -> Tensor:
                return gone.all_but(keep ** (stage + 1), received.scores, first=stage == 0)

            removals.append(RemoveTokens(least_attended, range(start, end), how=how, positions=positions))
        yield stack.enter_context(intervene(model, tokens, *removals))


def kept_tokens(counts: Int[Tensor, "*rows"], keep: float) -> Int[Tensor, "*rows"]:
    """How many of so many tokens the share `keep` of them is, rounded down. On the CPU, in double precision: in single
    precision 1/3 of 9 may be less than 3."""
    return (counts.cpu().double() * keep + 1e-6).floor().long()


def _asking(tokens: TokenMap, queries: str) -> Bool[Tensor, "batch positions"]:
    """The positions whose attention ranks: neither padding nor response, which is not there yet when tokens are chosen."""
    if queries not in ("last", "all"):
        raise ValueError(f"unknown queries={queries!r}: they are 'last' or 'all'")
    prompt = tokens.labels != tokens.index(tokens.generated)
    if "pad" in tokens.groups:
        prompt &= ~tokens.mask("pad")
    if queries == "all":
        return prompt
    return prompt & (prompt.flip(1).cumsum(dim=1).flip(1) == 1)


class _Gone:
    """The visual tokens that are gone so far."""

    def __init__(self, pictures: Selection) -> None:
        self.pictures = pictures
        self.gone: Bool[Tensor, "batch positions"]

    def all_but(
        self, keep: float, scores: Float[Tensor, "batch positions"], first: bool
    ) -> Bool[Tensor, "batch positions"]:
        """All but the share `keep` of each row's, those that are left with the highest scores."""
        pictures = self.pictures.so_far
        left = pictures if first else pictures & ~self.gone
        count = kept_tokens(pictures.sum(dim=1, keepdim=True), keep).to(pictures.device)
        rank = scores.masked_fill(~left, -torch.inf).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        self.gone = pictures & ~(left & (rank < count))
        return self.gone


class _Received:
    """Attention that each position gets from chosen queries in one layer: sum over them, mean over heads."""

    def __init__(
        self, decoder: PreTrainedModel, window: TokenWindow, layer: int, asking: Tensor, stack: ExitStack
    ) -> None:
        self.layer, self.window, self.asking = decoder_layers(decoder)[layer], window, Selection(window, asking)
        KernelWatch(self.layer.get_submodule("self_attn"), self.wanted, self.add).install(stack)

    def wanted(self) -> Bool[Tensor, " queries"] | None:
        if not acts(self.window, "prefill"):
            return None
        self.members, cut = self.asking.queries, cut_of(self.layer)
        self.keys: Int[Tensor, "batch keys"] | None = None
        if cut is not None:
            self.members, self.keys = cut.rows(self.members) & ~cut.filler, cut.keys
        self.scores = torch.zeros(self.window.labels.shape, device=self.members.device)
        return self.members.any(dim=0)

    def add(self, rows: Int[Tensor, " rows"], weights: Float[Tensor, "batch heads rows keys"]) -> None:
        members = self.members[:, rows.to(self.members.device)].to(weights)
        shares = torch.einsum("bq,bhqk->bk", members, weights).div(weights.shape[1]).to(self.scores.device)
        if self.keys is None:
            self.scores += shares[:, : self.scores.shape[1]]
        else:
            self.scores.scatter_add_(1, self.keys, shares)
