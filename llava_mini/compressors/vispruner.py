"""VisPruner: patches of highest attention, and diverse ones among the rest, without duplicates."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..full_precision import without_autocast
from . import Compressor, grid_side, register
from .uniform import select_patches

# Patches that a round of duplicate removal drops, as a share of all patches: 8 of 576.
ROUND_SHARE = 8 / 576


@register("vispruner")
class VisPrunerCompressor(Compressor):
    """Keep important patches by saliency and diverse patches by duplicate removal, half of each, without parameters.

    Source: VisPruner, arXiv 2412.01818v2; Theia-4869/VisPruner.

    The n - m patches of highest saliency are important, with n = C x C and m = floor(n / 2). R are the other patches, in
    descending saliency. A round of duplicate removal, repeated until m of R are left:

    1. Split R alternately into A and B.
    2. The duplication of each patch of A is its highest cosine with a patch of B.
    3. Drop the r patches of A of highest duplication.

    r is 8 of 576 patches, the same share of any other number, and no more than there are to drop. The kept patches are in
    row-major order. Of equal values the first patch wins.

    Departures: saliency comes from the layer whose output is compressed, averaged over its heads. A vision tower without
    a class token has the mean attention of all patches instead.

    Gradients pass through the kept patches, not through their choice.

    Shapes:
        features (batch, S * S, width), saliency (batch, S * S)
        -> tokens (batch, C * C, width), weights (batch, C * C, S * S)

    Raises:
        ValueError: If the patches form no square grid, or are fewer than C x C.
    """

    needs = ("saliency",)

    @without_autocast
    def forward(
        self, features: Float[Tensor, "batch patches width"], saliency: Float[Tensor, "batch patches"]
    ) -> tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch tokens patches"]]:
        patches, tokens = features.shape[1], self.size**2
        grid_side(patches, self.size)
        diverse_count = tokens // 2
        order = saliency.argsort(dim=1, descending=True, stable=True)
        important, others = order.split([tokens - diverse_count, patches - tokens + diverse_count], dim=1)
        dropped_per_round = max(1, round(ROUND_SHARE * patches))
        diverse = without_duplicates(features.detach(), others, diverse_count, dropped_per_round)
        return select_patches(features, torch.cat([important, diverse], dim=1).sort(dim=1).values)


def without_duplicates(
    features: Float[Tensor, "batch patches width"],
    candidates: Int[Tensor, "batch candidates"],
    count: int,
    dropped_per_round: int,
) -> Int[Tensor, "batch count"]:
    """Return the `count` candidates that are left when duplicates are dropped round by round, in their order.

    Args:
        features: Features of all patches.
        candidates: Indices of the patches that may be kept.
        count: Number of candidates to keep.
        dropped_per_round: Number of candidates that a round drops, at most.
    """
    if not count:
        return candidates[:, :0]
    directions = nn.functional.normalize(features.float(), dim=-1)
    while (left := candidates.shape[1]) > count:
        first, second = candidates[:, ::2], candidates[:, 1::2]
        a, b = (directions.take_along_dim(half[..., None], dim=1) for half in (first, second))
        duplication = (a @ b.transpose(1, 2)).amax(dim=2)
        drops = min(dropped_per_round, left - count, first.shape[1])
        dropped = 2 * duplication.argsort(dim=1, descending=True, stable=True)[:, :drops]  # places among the candidates
        is_dropped = torch.zeros_like(candidates).scatter(1, dropped, 1)
        candidates = candidates.gather(1, is_dropped.argsort(dim=1, stable=True)[:, : left - drops])
    return candidates
