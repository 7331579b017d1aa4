"""What the vision tower says of crops: its features, and the attention and keys that compressors choose patches by."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .tiles import stitch

if TYPE_CHECKING:
    from .configuration import LlavaMiniConfig

# The attention modules whose queries and keys are the outputs of two linear maps, and those maps' names. DINOv2's have
# changed class and names between versions of transformers.
QUERY_AND_KEY = {
    "CLIPAttention": ("q_proj", "k_proj"),
    "SiglipAttention": ("q_proj", "k_proj"),
    "Dinov2Attention": ("q_proj", "k_proj"),
    "Dinov2SelfAttention": ("query", "key"),
}
QUERIES_AT_ONCE = 128


@dataclass(frozen=True)
class TowerView:
    """What the tower says of some crops, or of frames made of them.

    Args:
        features: Of the selected layers, ahead of the projector.
        saliency: The attention that each patch gets in the selected layer, the mean over its heads: from the class
            token, or from all patches on average where the tower has none. None unless the compressor needs it.
        keys: That layer's keys, all heads side by side. None unless the compressor needs them.
    """

    features: Float[Tensor, "crops patches vision_width"]
    saliency: Float[Tensor, "crops patches"] | None = None
    keys: Float[Tensor, "crops patches key_width"] | None = None

    def of_frames(self, crops: int) -> TowerView:
        """One grid of patches for each frame of so many crops: that of its only crop, or its tiles' stitched. The
        whole picture that follows the tiles is left out. A patch's saliency stays its share in its own tile."""
        if crops == 1:
            return self

        def stitched(states: Tensor) -> Tensor:
            tiles = states.unflatten(0, (len(states) // crops, crops))[:, :-1]
            return stitch(tiles, math.isqrt(crops))

        return TowerView(
            stitched(self.features),
            None if self.saliency is None else stitched(self.saliency[..., None])[..., 0],
            None if self.keys is None else stitched(self.keys),
        )


def query_and_key(tower: nn.Module, feature_layer: int | list[int]) -> tuple[nn.Module, nn.Module]:
    """The linear maps that make queries and keys in the layer whose output is selected, the deepest of several.

    Args:
        tower: A vision tower of transformers.
        feature_layer: As LLaVA's `vision_feature_layer`: index into the hidden states, of which the first are the
            embeddings.

    Raises:
        ValueError: If the tower is of an unknown class, or the embeddings are selected.
    """
    maps = [
        (getattr(module, query), getattr(module, key))
        for module in tower.modules()
        for query, key in [QUERY_AND_KEY.get(type(module).__name__, ("", ""))]
        if hasattr(module, query)
    ]
    if not maps:
        raise ValueError(
            f"a compressor that needs saliency or keys reads the attention of CLIP, SigLIP and DINOv2; this vision tower "
            f"is a {type(tower).__name__}"
        )
    chosen = [feature_layer] if isinstance(feature_layer, int) else feature_layer
    depth = max(index % (len(maps) + 1) for index in chosen)
    if depth == 0:
        raise ValueError(
            f"vision_feature_layer={feature_layer} selects the embeddings, which no layer attends in: a compressor that "
            "needs saliency or keys needs a layer's output"
        )
    return maps[depth - 1]


@contextmanager
def outputs(*modules: nn.Module) -> Iterator[list[Any]]:
    """What these modules return last while the block runs, in their order."""
    seen: list[Any] = [None] * len(modules)

    def keep(place: int) -> Any:
        return lambda module, args, output: seen.__setitem__(place, output)

    handles = [module.register_forward_hook(keep(place)) for place, module in enumerate(modules)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def attention_received(
    queries: Float[Tensor, "crops positions width"], keys: Float[Tensor, "crops positions width"], heads: int
) -> Float[Tensor, "crops positions"]:
    """softmax(Q K^T / sqrt(d)) averaged over heads and queries, in float32. Some queries at a time: a tower without a
    class token has as many as patches."""
    query, key = (
        states.float().unflatten(-1, (heads, -1)).transpose(1, 2) for states in (queries, keys)
    )  # (crops, heads, positions, head_width)
    received = [
        (part @ key.transpose(2, 3) * key.shape[-1] ** -0.5).softmax(dim=-1).sum(dim=(1, 2))
        for part in query.split(QUERIES_AT_ONCE, dim=2)
    ]
    return torch.stack(received).sum(dim=0) / (heads * queries.shape[1])


def look(
    tower: nn.Module,
    config: LlavaMiniConfig,
    pixel_values: Float[Tensor, "crops channels height width"],
    attends: bool,
) -> TowerView:
    """One run of the tower, in whatever attention it is set to, with saliency and keys if `attends`. Positions that the
    configuration drops, the class token's, are left out of all."""
    selected, first = config.vision_feature_layer, int(config.vision_feature_select_strategy == "default")
    maps = query_and_key(tower, selected) if attends else ()
    with outputs(*maps) as seen:
        hidden_states = tower(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
    layers = [selected] if isinstance(selected, int) else selected
    features = torch.cat([hidden_states[layer] for layer in layers], dim=-1)[:, first:]
    if not attends:
        return TowerView(features)
    queries, keys = cast(list[Tensor], seen)
    heads = cast(Any, config.vision_config).num_attention_heads
    saliency = attention_received(queries[:, :1] if first else queries, keys, heads)
    return TowerView(features, saliency[:, first:], keys[:, first:])


__all__ = ["TowerView"]
