"""Position embeddings of the tokens that stay, as if removed ones had never been there."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from probes.interventions.selection import OncePerCall, Selection


class Renumbering:
    """Computes position embeddings anew: each token's position less the removed tokens before it in its row.

    Raises ValueError for a decoder without rotary embeddings, or layers without one position id for each token.
    """

    def __init__(self, decoder: PreTrainedModel, selection: Selection, once: OncePerCall) -> None:
        if not hasattr(decoder, "rotary_emb"):
            raise ValueError(f"{type(decoder).__name__} has no rotary_emb: its positions cannot be renumbered")
        self.decoder, self.selection, self.once = decoder, selection, once
        self.by_layer = "layer_type" in inspect.signature(decoder.rotary_emb.forward).parameters

    def __call__(self, layer: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments of a layer with positions renumbered; `hidden` for their type and device."""
        position_ids = kwargs.get("position_ids")
        if position_ids is None or position_ids.ndim != 2 or kwargs.get("position_embeddings") is None:
            given = "none" if position_ids is None else f"position ids of shape {list(position_ids.shape)}"
            raise ValueError(
                f"positions='renumber' needs one position id for each token, [batch, queries]: got {given}"
            )

        def renumber() -> tuple[Tensor, Any]:
            before = self.selection.so_far.cumsum(dim=1)[:, -position_ids.shape[1] :].to(position_ids.device)
            renumbered = position_ids - before
            kind = {"layer_type": self.decoder.config.layer_types[layer]} if self.by_layer else {}
            return renumbered, self.decoder.rotary_emb(hidden, position_ids=renumbered, **kind)

        renumbered, embeddings = self.once("renumber", renumber, kwargs["position_embeddings"], position_ids)
        return kwargs | {"position_ids": renumbered, "position_embeddings": embeddings}
