"""Attention that visual tokens receive in one layer, by which methods rank them."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from probes.attention.kernel_watch import KernelWatch
from probes.hooks.decoder import decoder_layers
from probes.hooks.partial_call import current_subset
from probes.hooks.token_window import TokenWindow
from probes.interventions.selection import DeferredTokenSelector, TokenSelection, acts_in_current_call


class ReceivedAttention:
    """Attention that each position receives from the ranking queries in one layer: sum over queries, mean over heads.

    Args:
        decoder: The stack of decoder layers.
        window: The positions of the map that the current call covers.
        layer: The layer whose attention counts.
        ranking_queries: The positions whose attention counts. A callable is called when the layer runs.
        stack: Gets the callbacks that remove the hooks.

    Attributes:
        scores: Attention received in the current prompt `[batch, positions]`.
    """

    def __init__(
        self,
        decoder: PreTrainedModel,
        window: TokenWindow,
        layer: int,
        ranking_queries: DeferredTokenSelector,
        stack: ExitStack,
    ) -> None:
        self.layer, self.window = decoder_layers(decoder)[layer], window
        self.ranking_queries = TokenSelection(window, ranking_queries)
        KernelWatch(self.layer.get_submodule("self_attn"), self.select_queries, self.add).install(stack)

    def select_queries(self) -> Bool[Tensor, " queries"] | None:
        """Begin a call of the layer, and return the queries to watch; None after the prompt."""
        if not acts_in_current_call(self.window, "prefill"):
            return None
        self.ranking_queries.begin()
        self.members, subset = self.ranking_queries.queries, current_subset(self.layer)
        self.keys: Int[Tensor, "batch keys"] | None = None
        if subset is not None:
            subset = subset.to(self.members.device)
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
