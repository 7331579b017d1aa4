"""Decoder layer calls that an intervention runs on a subset of the tokens of the model call."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from probes.hooks.decoder import decoder_layers

_ATTRIBUTE = "_probes_call_subset"
# Layer arguments that callers which shorten a call know how to shorten.
_KNOWN_ARGUMENTS = {
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
class CallSubset:
    """Describe the queries and keys that remain in a layer call; shorter rows end with filler.

    Attributes:
        queries: Index of each remaining query in the whole call `[batch, kept]`.
        query_filler: Which of them are filler `[batch, kept]`.
        keys: Position of each remaining key in the token map `[batch, keys]`; 0 for filler.
        key_filler: Which of them are filler `[batch, keys]`.
        call_length: Number of queries in the whole call.
    """

    queries: Int[Tensor, "batch kept"]
    query_filler: Bool[Tensor, "batch kept"]
    keys: Int[Tensor, "batch keys"]
    key_filler: Bool[Tensor, "batch keys"]
    call_length: int

    def to(self, device: torch.device) -> CallSubset:
        """Return the same subset on a device; layers of one model may lie on several."""
        if self.queries.device == device:
            return self
        names = ("queries", "query_filler", "keys", "key_filler")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    @cached_property
    def has_filler(self) -> bool:
        """Whether any query or key is filler."""
        return bool(self.query_filler.any() or self.key_filler.any())

    def select_queries(self, values: Tensor, dim: int = 1) -> Tensor:
        """Return `values` of the remaining queries along `dim`; the preceding dimension is the batch or has size 1."""
        return gather_per_row(values, self.queries, dim)

    def select_edges(self, values: Tensor) -> Tensor:
        """Return per-edge values of the remaining queries and keys.

        Args:
            values: `[batch or 1, 1, queries, keys]` of the whole call, with keys from the first position of the map on.

        Returns:
            `[batch, 1, kept, keys]`.
        """
        subset, whole = self.to(values.device), values.expand(len(self.queries), -1, -1, -1)[:, 0]
        rows = whole.gather(1, subset.queries[:, :, None].expand(-1, -1, whole.shape[2]))
        columns = subset.keys[:, None].expand(-1, rows.shape[1], -1)
        return rows.gather(2, columns)[:, None]

    def scatter_to_call(self, values: Float[Tensor, "batch kept width"]) -> Float[Tensor, "batch queries width"]:
        """Return `values` of the remaining queries at their positions in the whole call, with NaN elsewhere."""
        subset = self.to(values.device)
        values = values.masked_fill(subset.query_filler[..., None], torch.nan)
        empty = values.new_full((len(values), self.call_length, values.shape[2]), torch.nan)
        return empty.scatter(1, subset.queries[..., None].expand_as(values), values)


def gather_per_row(values: Tensor, index: Int[Tensor, "batch kept"], dim: int) -> Tensor:
    """Return `values` at `index` along `dim`; the preceding dimension is the batch or has size 1."""
    dim = dim % values.ndim
    shape = [1] * values.ndim
    shape[dim - 1 : dim + 1] = index.shape
    expanded = list(values.shape)
    expanded[dim - 1 : dim + 1] = index.shape
    source = list(values.shape)
    source[dim - 1] = index.shape[0]
    return values.expand(source).gather(dim, index.to(values.device).view(shape).expand(expanded))


def kept_indices(
    removed: Bool[Tensor, "batch queries"],
) -> tuple[Int[Tensor, "batch kept"], Bool[Tensor, "batch kept"]]:
    """Return the ascending indices of the queries that are not removed, and which of the indices are filler.

    All rows have the length of the longest one, at least 1.

    Args:
        removed: Mask of the removed queries.

    Example:
        >>> indices, filler = kept_indices(torch.tensor([[True, False, False], [True, True, False]]))
        >>> indices.tolist(), filler.tolist()
        ([[1, 2], [2, 0]], [[False, False], [False, True]])
    """
    order = removed.long().argsort(dim=1, stable=True)
    width = max(int((~removed).sum(dim=1).max()), 1)
    order = order[:, :width]
    return order, torch.gather(removed, 1, order)


def can_run_subset(decoder: nn.Module, length: int) -> bool:
    """Return whether the layers of a stack can run on a subset of the tokens of a call.

    They can if they receive position embeddings, and no per-token arguments beyond those known here. Llama 4 scales
    queries by their index in the call if the call is long.

    Args:
        decoder: The stack.
        length: Number of positions of the call.
    """
    if any(_scales_by_index(layer, length) for layer in decoder_layers(decoder)):
        return False
    # The forward of the class, because libraries that offload weights put a forward of their own on the module.
    signatures = [inspect.signature(type(layer).forward) for layer in decoder_layers(decoder)]
    argument_names = [
        {name for name, parameter in signature.parameters.items() if parameter.kind is not parameter.VAR_KEYWORD}
        for signature in signatures
    ]
    return all("position_embeddings" in names <= _KNOWN_ARGUMENTS for names in argument_names)


def _scales_by_index(layer: nn.Module, length: int) -> bool:
    attention = getattr(layer, "self_attn", None)
    tuned = getattr(attention, "attn_temperature_tuning", False) and not getattr(attention, "use_rope", True)
    return bool(tuned) and length >= attention.floor_scale  # type: ignore[union-attr, operator]


def current_subset(layer: nn.Module) -> CallSubset | None:
    """Return the subset that the running call of a layer covers, or None if it covers all tokens."""
    return layer.__dict__.get(_ATTRIBUTE)


def set_current_subset(layer: nn.Module, subset: CallSubset | None) -> None:
    """Record the subset that the running call of a layer covers; None ends the record."""
    state: dict[str, Any] = layer.__dict__
    if subset is None:
        state.pop(_ATTRIBUTE, None)
    else:
        state[_ATTRIBUTE] = subset
