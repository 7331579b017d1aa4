"""VisionZip: the patches that the vision tower attends to most as they are, the rest merged into a few by likeness."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from . import Compressor, grid_side, register
from .prumerge import most, others

if TYPE_CHECKING:
    from transformers import LlavaConfig

# Contextual tokens among all: 10 of 64 in the paper, 20 of 128, 30 of 192.
CONTEXTUAL = 10 / 64


@register("visionzip")
class VisionZipCompressor(Compressor):
    """Dominant and contextual tokens (VisionZip, arXiv 2412.04467; dvlab-research/VisionZip), without parameters.

    Of n = C x C tokens round(10 n / 64) = c are contextual. The n - c dominant ones are the patches of highest saliency,
    unchanged and in row-major order. Of the R patches that are left, in that order, those at 0, s, 2s, ... with
    s = floor(R / c) are the targets; each other joins the target to whose keys, averaged over the heads, its own have the
    highest cosine, and a contextual token is the mean of a target and those that joined it. With n = 1 there is no
    contextual token: the one patch of highest saliency is all that is left of the picture.

    Departures: the class token is no candidate, where in the paper it is one of the dominant tokens. The released code
    adds the mean of those that joined to the target; here, as the paper writes, they are averaged.

    What is chosen and merged is not differentiated, the means are.

    Raises:
        ValueError: If the patches form no square grid or are fewer than C x C.
    """

    needs = ("saliency", "keys")

    def __init__(self, config: LlavaConfig):
        super().__init__(config)
        vision: Any = config.vision_config
        self.heads = vision.num_attention_heads

    def forward(
        self,
        features: Float[Tensor, "batch patches width"],
        saliency: Float[Tensor, "batch patches"],
        keys: Float[Tensor, "batch patches key_width"],
    ) -> tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch tokens patches"]]:
        patches, tokens = features.shape[1], self.size**2
        grid_side(patches, self.size)
        contextual = round(CONTEXTUAL * tokens)
        dominant = most(saliency, tokens - contextual)
        weights = nn.functional.one_hot(dominant, patches).to(features.dtype)  # (batch, dominant, patches)
        if contextual:
            left = others(dominant, patches)[..., None]  # (batch, left, 1)
            merged = keys.float().unflatten(-1, (self.heads, -1)).mean(dim=2)
            directions = nn.functional.normalize(merged, dim=-1).take_along_dim(left, dim=1)
            targets = torch.arange(contextual, device=left.device) * (left.shape[1] // contextual)
            likeness = directions @ directions[:, targets].transpose(1, 2)  # (batch, left, contextual)
            joined = likeness.argmax(dim=-1)
            joined[:, targets] = torch.arange(contextual, device=left.device)
            groups = nn.functional.one_hot(joined, contextual).to(features.dtype)
            means = (groups / groups.sum(dim=1, keepdim=True)).transpose(1, 2)  # (batch, contextual, left)
            places = left.transpose(1, 2).expand_as(means)
            weights = torch.cat([weights, means.new_zeros(*means.shape[:2], patches).scatter(2, places, means)], dim=1)
        return weights @ features, weights
