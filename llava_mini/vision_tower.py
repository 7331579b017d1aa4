"""Run of the vision tower: its features, and the saliency and keys by which compressors choose patches."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .full_precision import without_autocast
from .partial_vision_tower import hidden_states_at
from .tiles import stitch_tiles

if TYPE_CHECKING:
    from .configuration import LlavaMiniConfig

# Attention modules whose queries and keys are outputs of two linear maps, and the names of these maps. DINOv2's class
# and names differ between versions of transformers.
QUERY_KEY_PROJECTIONS = {
    "CLIPAttention": ("q_proj", "k_proj"),
    "SiglipAttention": ("q_proj", "k_proj"),
    "Dinov2Attention": ("q_proj", "k_proj"),
    "Dinov2SelfAttention": ("query", "key"),
}
QUERY_CHUNK_SIZE = 128


@dataclass(frozen=True)
class VisionFeatures:
    """Hold the vision tower's output for crops, or for frames that are stitched from crops.

    Args:
        features (`torch.FloatTensor` of shape `(crops, patches, vision_width)`):
            Features of the selected layers, ahead of the projector.
        saliency (`torch.FloatTensor` of shape `(crops, patches)`, *optional*):
            Attention that each patch receives in the selected layer, averaged over its heads. It comes from the class
            token, or from all patches on average if the vision tower has no class token. None unless requested.
        keys (`torch.FloatTensor` of shape `(crops, patches, key_width)`, *optional*):
            Keys of that layer, all heads concatenated. None unless requested.
    """

    features: Float[Tensor, "crops patches vision_width"]
    saliency: Float[Tensor, "crops patches"] | None = None
    keys: Float[Tensor, "crops patches key_width"] | None = None

    def stitch_frames(self, crops: int) -> VisionFeatures:
        """Return one grid of patches for each frame.

        A frame of one crop keeps its grid. Otherwise the grids of its tiles are stitched, and the whole image, which
        follows the tiles, is left out. A patch's saliency remains its share within its own tile.

        Args:
            crops: Number of crops of each frame.
        """
        if crops == 1:
            return self

        def stitch(states: Tensor) -> Tensor:
            tiles = states.unflatten(0, (len(states) // crops, crops))[:, :-1]
            return stitch_tiles(tiles, math.isqrt(crops))

        return VisionFeatures(
            stitch(self.features),
            None if self.saliency is None else stitch(self.saliency[..., None])[..., 0],
            None if self.keys is None else stitch(self.keys),
        )


def query_key_projections(vision_tower: nn.Module, feature_layer: int | list[int]) -> tuple[nn.Module, nn.Module]:
    """Return the linear maps that compute queries and keys in the selected layer, the deepest of several.

    Args:
        vision_tower: A vision tower of transformers.
        feature_layer: LLaVA's `vision_feature_layer`, an index into the hidden states, which start with the embeddings.

    Raises:
        ValueError: If the vision tower has an unknown class, or the embeddings are selected.
    """
    projections = [
        (getattr(module, query), getattr(module, key))
        for module in vision_tower.modules()
        for query, key in [QUERY_KEY_PROJECTIONS.get(type(module).__name__, ("", ""))]
        if hasattr(module, query)
    ]
    if not projections:
        raise ValueError(
            f"the vision tower is a {type(vision_tower).__name__}; a compressor that needs saliency or keys supports "
            "CLIP, SigLIP and DINOv2"
        )
    selected = [feature_layer] if isinstance(feature_layer, int) else feature_layer
    depth = max(index % (len(projections) + 1) for index in selected)
    if depth == 0:
        raise ValueError(
            f"vision_feature_layer={feature_layer} selects the embeddings, which no attention computes; a compressor "
            "that needs saliency or keys needs the output of a layer"
        )
    return projections[depth - 1]


@contextmanager
def capture_outputs(*modules: nn.Module) -> Iterator[list[Any]]:
    """Yield a list that holds the latest output of each module while the block runs, in the modules' order."""
    latest: list[Any] = [None] * len(modules)

    def store_at(index: int) -> Callable[..., None]:
        return lambda module, args, output: latest.__setitem__(index, output)

    handles = [module.register_forward_hook(store_at(index)) for index, module in enumerate(modules)]
    try:
        yield latest
    finally:
        for handle in handles:
            handle.remove()


@without_autocast
def attention_received(
    queries: Float[Tensor, "crops positions width"], keys: Float[Tensor, "crops positions width"], heads: int
) -> Float[Tensor, "crops positions"]:
    """Compute the attention that each position receives, averaged over heads and queries: softmax(Q K^T / sqrt(d)).

    It is computed in float32 and for QUERY_CHUNK_SIZE queries at a time, because a vision tower without a class token
    has as many queries as patches.
    """
    query, key = (
        states.float().unflatten(-1, (heads, -1)).transpose(1, 2) for states in (queries, keys)
    )  # (crops, heads, positions, head_width)
    received = [
        (chunk @ key.transpose(2, 3) * key.shape[-1] ** -0.5).softmax(dim=-1).sum(dim=(1, 2))
        for chunk in query.split(QUERY_CHUNK_SIZE, dim=2)
    ]
    return torch.stack(received).sum(dim=0) / (heads * queries.shape[1])


def resize_pixels(
    pixel_values: Float[Tensor, "crops channels height width"], side: int
) -> Float[Tensor, "crops channels side side"]:
    """Resize crops to `side` x `side` pixels, bicubically with antialiasing and in float32."""
    resized = nn.functional.interpolate(
        pixel_values.float(), size=(side, side), mode="bicubic", align_corners=False, antialias=True
    )
    return resized.to(pixel_values.dtype)


def run_vision_tower(
    vision_tower: nn.Module,
    config: LlavaMiniConfig,
    pixel_values: Float[Tensor, "crops channels height width"],
    with_attention: bool,
) -> VisionFeatures:
    """Run the vision tower once up to the deepest selected layer, with its own attention implementation.

    If `config.encoded_side` is set, the pixels are resized first and the vision tower interpolates its positions.

    Args:
        vision_tower: A vision tower of transformers.
        config: Configuration with the selected layers. If it drops the class token, all outputs lack its position.
        pixel_values: Pixels of the crops.
        with_attention: Also return saliency and keys.

    Raises:
        ValueError: If `with_attention` is set and [`query_key_projections`] does not support the vision tower.
    """
    selected, first = config.vision_feature_layer, int(config.vision_feature_select_strategy == "default")
    projections = query_key_projections(vision_tower, selected) if with_attention else ()
    options: dict[str, Any] = {}
    if config.encoded_side is not None:
        vision: Any = config.vision_config
        pixel_values = resize_pixels(pixel_values, config.encoded_side * vision.patch_size)
        # DINOv2 has no such option, because it always interpolates.
        if "interpolate_pos_encoding" in inspect.signature(type(vision_tower).forward).parameters:
            options["interpolate_pos_encoding"] = True
    layers = [selected] if isinstance(selected, int) else selected
    with capture_outputs(*projections) as captured:
        hidden_states = hidden_states_at(vision_tower, layers, pixel_values, **options)
    features = torch.cat(hidden_states, dim=-1)[:, first:]
    if not with_attention:
        return VisionFeatures(features)
    queries, keys = cast(list[Tensor], captured)
    heads = cast(Any, config.vision_config).num_attention_heads
    saliency = attention_received(queries[:, :1] if first else queries, keys, heads)
    return VisionFeatures(features, saliency[:, first:], keys[:, first:])


__all__ = ["VisionFeatures", "query_key_projections", "run_vision_tower"]
