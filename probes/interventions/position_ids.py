"""Position embeddings of the remaining tokens, as if removed tokens had never been there."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from probes.interventions.selection import PerCallCache, TokenSelection


class PositionRenumbering:
    """Recomputes position embeddings: each token's position minus the number of removed tokens before it in its row.

    Args:
        decoder: The stack of decoder layers.
        selection: The removed tokens.
        once_per_call: Cache of results that the layers of a call share.

    Raises:
        ValueError: The decoder has no rotary embeddings.
    """

    def __init__(self, decoder: PreTrainedModel, selection: TokenSelection, once_per_call: PerCallCache) -> None:
        if not hasattr(decoder, "rotary_emb"):
            raise ValueError(f"{type(decoder).__name__} has no rotary_emb: its positions cannot be renumbered")
        self.decoder, self.selection, self.once_per_call = decoder, selection, once_per_call
        self.has_layer_types = "layer_type" in inspect.signature(decoder.rotary_emb.forward).parameters

    def __call__(self, layer: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the keyword arguments of a layer with renumbered positions.

        Args:
            layer: Index of the layer.
            hidden: Hidden states, for their type and device.
            kwargs: The layer's keyword arguments.

        Raises:
            ValueError: The decoder does not rotate each token by one position id, as in Qwen-VL.
        """
        position_ids: Any = kwargs.get("position_ids")
        embeddings: Any = kwargs.get("position_embeddings")
        layer_type = {"layer_type": self.decoder.config.layer_types[layer]} if self.has_layer_types else {}

        def renumber() -> tuple[Tensor, Any]:
            if not self._has_one_id_per_token(hidden, position_ids, embeddings, layer_type):
                raise ValueError(
                    f"{type(self.decoder).__name__} does not rotate its tokens by one position id each: "
                    "its positions cannot be renumbered, use positions='keep'"
                )
            removed_before = self.selection.so_far.cumsum(dim=1)[:, -position_ids.shape[1] :].to(position_ids.device)
            renumbered = position_ids - removed_before
            return renumbered, self.decoder.rotary_emb(hidden, position_ids=renumbered, **layer_type)

        new_ids, new_embeddings = self.once_per_call("renumber", renumber, embeddings, position_ids)
        return kwargs | {"position_ids": new_ids, "position_embeddings": new_embeddings}

    def _has_one_id_per_token(
        self, hidden: Tensor, position_ids: Any, embeddings: Any, layer_type: dict[str, str]
    ) -> bool:
        """Return whether the layer's embeddings follow from one position id for each token."""
        if position_ids is None or position_ids.ndim != 2 or embeddings is None:
            return False
        try:
            return _all_close(self.decoder.rotary_emb(hidden, position_ids=position_ids, **layer_type), embeddings)
        except IndexError:  # Qwen-VL's rotary_emb needs three axes in transformers before 5.23
            return False


def _all_close(first: Tensor | tuple[Tensor, ...], second: Tensor | tuple[Tensor, ...]) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):  # Llama 4's complex rotations
        first, second = (first,), (second,)
    return all(a.shape == b.shape and torch.allclose(a, b) for a, b in zip(first, second, strict=True))
