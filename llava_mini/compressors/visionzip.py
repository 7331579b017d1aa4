"""VisionZip: the patches of highest attention stay unchanged; the others are merged into a few tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..full_precision import without_autocast
from . import Compressor, grid_side, register
from .prumerge import most_salient_patches, remaining_patches

if TYPE_CHECKING:
    from transformers import LlavaConfig

# Contextual tokens as a share of all tokens: 10 of 64 in the paper, 20 of 128, 30 of 192.
CONTEXTUAL_SHARE = 10 / 64


@register("visionzip")
class VisionZipCompressor(Compressor):
    """Keep dominant patches as they are and merge the others into contextual tokens, without parameters.

    Source: VisionZip, arXiv 2412.04467; dvlab-research/VisionZip.

    ```
    dominant_i   = x_i,  i over the n - c patches of highest saliency,  n = C x C,  c = round(10 n / 64)
    contextual_t = mean of x_t and all x_r whose keys are most similar to those of target t
    ```

    Dominant tokens are in row-major order. R are the other patches in row-major order. The targets are those at
    0, s, 2s, ... of R, with s = floor(|R| / c). Every other patch of R joins the target of highest cosine between their
    keys, which are averaged over the heads. With n = 1 there is no contextual token: only the patch of highest saliency
    is left of the image.

    Departures: the class token is no candidate, whereas it is one of the paper's dominant tokens. A contextual token is
    a mean, as the paper writes; the released code adds the mean of the joined patches to the target.

    Gradients pass through the means, not through the choice of patches.

    Shapes:
        features (batch, S * S, width), saliency (batch, S * S), keys (batch, S * S, key_width)
        -> tokens (batch, C * C, width), weights (batch, C * C, S * S)

    Raises:
        ValueError: If the patches form no square grid, or are fewer than C x C.
    """

    needs = ("saliency", "keys")

    def __init__(self, config: LlavaConfig):
        super().__init__(config)
        vision: Any = config.vision_config
        self.heads = vision.num_attention_heads

    @without_autocast
    def forward(
        self,
        features: Float[Tensor, "batch patches width"],
        saliency: Float[Tensor, "batch patches"],
        keys: Float[Tensor, "batch patches key_width"],
    ) -> tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch tokens patches"]]:
        patches, tokens = features.shape[1], self.size**2
        grid_side(patches, self.size)
        contextual = round(CONTEXTUAL_SHARE * tokens)
        dominant = most_salient_patches(saliency, tokens - contextual)
        weights = nn.functional.one_hot(dominant, patches).to(features.dtype)  # (batch, dominant, patches)
        if contextual:
            remaining = remaining_patches(dominant, patches)[..., None]  # (batch, remaining, 1)
            mean_keys = keys.float().unflatten(-1, (self.heads, -1)).mean(dim=2)
            directions = nn.functional.normalize(mean_keys, dim=-1).take_along_dim(remaining, dim=1)
            targets = torch.arange(contextual, device=remaining.device) * (remaining.shape[1] // contextual)
            similarity = directions @ directions[:, targets].transpose(1, 2)  # (batch, remaining, contextual)
            group_indices = similarity.argmax(dim=-1)
            group_indices[:, targets] = torch.arange(contextual, device=remaining.device)
            groups = nn.functional.one_hot(group_indices, contextual).to(features.dtype)
            means = (groups / groups.sum(dim=1, keepdim=True)).transpose(1, 2)  # (batch, contextual, remaining)
            columns = remaining.transpose(1, 2).expand_as(means)
            merged = means.new_zeros(*means.shape[:2], patches).scatter(2, columns, means)
            weights = torch.cat([weights, merged], dim=1)
        return weights @ features, weights
