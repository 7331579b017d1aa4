"""What a decoder layer is called with while an intervention runs it on fewer tokens than the call covers."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from probes.hooks.decoder import decoder_layers

_NAME = "_probes_cut"
# What a layer may be given that those who cut its call know of.
_ARGUMENTS = {
    "self",
    "hidden_states",
    "attention_mask",
    "position_ids",
    "position_embeddings",
    "cache",
    "past_key_values",
    "use_cache",
    "output_attentions",
}


@dataclass(frozen=True, eq=False)
class Cut:
    """Which queries and keys are left in a layer's call; rows with fewer than others are filled up.

    Attributes:
        queries: Index of each among the queries of the whole call.
        filler: Which of them only fill up.
        keys: Position of each key in the token map; 0 where it only fills up.
        key_filler: Which of them only fill up.
        length: Number of queries of the whole call.
    """

    queries: Int[Tensor, "batch kept"]
    filler: Bool[Tensor, "batch kept"]
    keys: Int[Tensor, "batch keys"]
    key_filler: Bool[Tensor, "batch keys"]
    length: int

    @cached_property
    def filled(self) -> bool:
        """Whether any query or key only fills up."""
        return bool(self.filler.any() or self.key_filler.any())

    def rows(self, values: Tensor, dim: int = 1) -> Tensor:
        """`values` of the kept queries along `dim`, whose dimension before is the batch or has size 1."""
        return take(values, self.queries, dim)

    def whole(self, values: Float[Tensor, "batch kept width"]) -> Float[Tensor, "batch queries width"]:
        """Values of the kept queries in the places they have in the whole call, NaN in the others."""
        values = values.masked_fill(self.filler[..., None], torch.nan)
        empty = values.new_full((len(values), self.length, values.shape[2]), torch.nan)
        return empty.scatter(1, self.queries[..., None].expand_as(values), values)

    def edges(self, values: Tensor) -> Tensor:
        """`[batch or 1, 1, queries, keys]` of the whole call, from the map's first position on, for what is left."""
        whole = values.expand(len(self.queries), -1, -1, -1)[:, 0]
        rows = whole.gather(1, self.queries[:, :, None].expand(-1, -1, whole.shape[2]))
        columns = self.keys[:, None].expand(-1, rows.shape[1], -1)
        return rows.gather(2, columns)[:, None]


def take(values: Tensor, index: Int[Tensor, "batch kept"], dim: int) -> Tensor:
    """`values` at `index` along `dim`; the dimension before it is the batch, or has size 1."""
    dim = dim % values.ndim
    shape = [1] * values.ndim
    shape[dim - 1 : dim + 1] = index.shape
    expanded = list(values.shape)
    expanded[dim - 1 : dim + 1] = index.shape
    source = list(values.shape)
    source[dim - 1] = index.shape[0]
    return values.expand(source).gather(dim, index.to(values.device).view(shape).expand(expanded))


def can_cut(decoder: nn.Module) -> bool:
    """Whether the layers can run on some of a call's tokens: they are told each one's position, and no more by token."""
    # The class's own: libraries that place weights on devices put a forward of theirs on the module.
    forwards = [inspect.signature(type(layer).forward) for layer in decoder_layers(decoder)]
    named = [
        {name for name, parameter in forward.parameters.items() if parameter.kind is not parameter.VAR_KEYWORD}
        for forward in forwards
    ]
    return all("position_embeddings" in names <= _ARGUMENTS for names in named)


def cut_of(layer: nn.Module) -> Cut | None:
    """How the layer's running call is cut; None where it covers all of the call's tokens."""
    return layer.__dict__.get(_NAME)


def set_cut(layer: nn.Module, cut: Cut | None) -> None:
    """Says how the layer's running call is cut; None when it is over."""
    state: dict[str, Any] = layer.__dict__
    if cut is None:
        state.pop(_NAME, None)
    else:
        state[_NAME] = cut


def kept_first(removed: Bool[Tensor, "batch queries"]) -> tuple[Int[Tensor, "batch kept"], Bool[Tensor, "batch kept"]]:
    """Indices of what is not removed, in order, filled up to the longest row (at least one); and which are filling."""
    order = removed.long().argsort(dim=1, stable=True)
    width = max(int((~removed).sum(dim=1).max()), 1)
    order = order[:, :width]
    return order, torch.gather(removed, 1, order)
