"""Position embeddings of the tokens that stay, as if removed ones had never been there."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from probes.interventions.selection import OncePerCall, Selection


class Renumbering:
    """Computes position embeddings anew: each token's position less the removed tokens before it in its row.

    Raises ValueError for a decoder without rotary embeddings, or one that does not turn each token by one position id.
    """

    def __init__(self, decoder: PreTrainedModel, selection: Selection, once: OncePerCall) -> None:
        if not hasattr(decoder, "rotary_emb"):
            raise ValueError(f"{type(decoder).__name__} has no rotary_emb: its positions cannot be renumbered")
        self.decoder, self.selection, self.once = decoder, selection, once
        self.by_layer = "layer_type" in inspect.signature(decoder.rotary_emb.forward).parameters

    def __call__(self, layer: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments of a layer with positions renumbered; `hidden` for their type and device."""
        position_ids: Any = kwargs.get("position_ids")
        embeddings: Any = kwargs.get("position_embeddings")
        kind = {"layer_type": self.decoder.config.layer_types[layer]} if self.by_layer else {}

        def renumber() -> tuple[Tensor, Any]:
            if not self._one_each(hidden, position_ids, embeddings, kind):
                raise ValueError(
                    f"{type(self.decoder).__name__} does not turn its tokens by one position id each, as Qwen-VL does not:"
                    " its positions cannot be renumbered"
                )
            before = self.selection.so_far.cumsum(dim=1)[:, -position_ids.shape[1] :].to(position_ids.device)
            renumbered = position_ids - before
            return renumbered, self.decoder.rotary_emb(hidden, position_ids=renumbered, **kind)

        renumbered, turned = self.once("renumber", renumber, embeddings, position_ids)
        return kwargs | {"position_ids": renumbered, "position_embeddings": turned}

    def _one_each(self, hidden: Tensor, position_ids: Any, embeddings: Any, kind: dict[str, str]) -> bool:
        """Whether the layer's tokens are turned by one position id each."""
        if position_ids is None or position_ids.ndim != 2 or embeddings is None:
            return False
        try:
            return _same(self.decoder.rotary_emb(hidden, position_ids=position_ids, **kind), embeddings)
        except IndexError:  # Qwen-VL's takes three axes alone in transformers before 5.23
            return False


def _same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> bool:
    return all(a.shape == b.shape and torch.allclose(a, b) for a, b in zip(ours, theirs, strict=True))
