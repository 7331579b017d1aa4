"""PruMerge: each patch of highest attention is merged with the patches most similar to it."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..full_precision import without_autocast
from . import Compressor, grid_side, register

# Neighbours merged into each kept patch, as a share of all patches: 32 of 576 in the paper.
NEIGHBOUR_SHARE = 32 / 576


@register("prumerge")
class PruMergeCompressor(Compressor):
    """Keep the C x C most salient patches and merge each with its neighbours, without parameters.

    Source: LLaVA-PruMerge (adaptive token selection and supplement), arXiv 2403.15388; 42Shawn/LLaVA-PruMerge.

    ```
    token_i = sum_j a_j x_j / sum_j a_j  over j in {i} and N(i)
    ```

    a is the saliency, and i runs over the n = C x C patches where a is highest. N(i) are the k nearest other patches by
    the cosine of their keys, kept ones among them. k is 32 for 576 patches, and the same share of any other number, at
    least one. The tokens are in the row-major order of the kept patches.

    Departures:

    - n is given, so that a table can compare methods. The paper keeps as many patches as are outliers of a: those above
      the third quartile by 1.5 interquartile ranges.
    - Saliency and keys come from the layer whose output is compressed, and the attention is averaged over its heads. The
      released code takes the last layer's attention as one head.
    - Every token is a mean. The released code adds the weighted sum of the neighbours, undivided, to the patch. It also
      adds one token made of all patches that were not kept.

    Gradients pass through the means, not through the choice of patches.

    Shapes:
        features (batch, S * S, width), saliency (batch, S * S), keys (batch, S * S, key_width)
        -> tokens (batch, C * C, width), weights (batch, C * C, S * S)

    Raises:
        ValueError: If the patches form no square grid, or are fewer than C x C.
    """

    needs = ("saliency", "keys")

    def kept_patches(self, saliency: Float[Tensor, "batch patches"]) -> Int[Tensor, "batch tokens"]:
        """Return the indices of the patches that become tokens, in ascending order."""
        return most_salient_patches(saliency, self.size**2)

    @without_autocast
    def forward(
        self,
        features: Float[Tensor, "batch patches width"],
        saliency: Float[Tensor, "batch patches"],
        keys: Float[Tensor, "batch patches key_width"],
    ) -> tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch tokens patches"]]:
        patches = features.shape[1]
        grid_side(patches, self.size)
        kept = self.kept_patches(saliency)[..., None]  # (batch, tokens, 1)
        directions = nn.functional.normalize(keys.float(), dim=-1)
        similarity = directions.take_along_dim(kept, dim=1) @ directions.transpose(1, 2)  # (batch, tokens, patches)
        # A patch must come first among its own neighbours, even where another patch has the same key.
        neighbours = similarity.scatter(2, kept, torch.inf).argsort(dim=-1, descending=True, stable=True)
        neighbours = neighbours[..., : 1 + max(1, round(NEIGHBOUR_SHARE * patches))]
        shares = saliency.float().clamp_min(torch.finfo(torch.float32).tiny)[:, None].expand_as(similarity)
        weights = torch.zeros_like(similarity).scatter(2, neighbours, shares.take_along_dim(neighbours, dim=2))
        weights = (weights / weights.sum(dim=-1, keepdim=True)).to(features.dtype)
        return weights @ features, weights


@register("prumerge_plus")
class PruMergePlusCompressor(PruMergeCompressor):
    """Keep salient patches and evenly spaced ones, half of each, and merge them as [`PruMergeCompressor`] does.

    Source: PruMerge+ of the same paper, arXiv 2403.15388.

    ```
    spaced_i = R[floor((2i + 1) |R| / 2m)],  i = 0 ... m - 1,  m = floor(n / 2)
    ```

    The n - m patches of highest saliency are kept; R are the other patches in row-major order.

    The released code differs. In training it takes as many spaced patches as salient ones, as here, but every eighth
    patch, which may be a salient one. In inference it takes three spaced patches for each outlier.
    """

    def kept_patches(self, saliency: Float[Tensor, "batch patches"]) -> Int[Tensor, "batch tokens"]:
        spaced_count = self.size**2 // 2
        salient = most_salient_patches(saliency, self.size**2 - spaced_count)
        remaining = remaining_patches(salient, saliency.shape[1])
        step = 2 * torch.arange(spaced_count, device=remaining.device) + 1
        spaced = step * remaining.shape[1] // (2 * max(spaced_count, 1))
        return torch.cat([salient, remaining[:, spaced]], dim=1).sort(dim=1).values


def most_salient_patches(saliency: Float[Tensor, "batch patches"], count: int) -> Int[Tensor, "batch count"]:
    """Return the indices of the patches of highest saliency, in ascending order. Of equal patches the first wins."""
    return saliency.argsort(dim=1, descending=True, stable=True)[:, :count].sort(dim=1).values


def remaining_patches(excluded: Int[Tensor, "batch count"], patches: int) -> Int[Tensor, "batch remaining"]:
    """Return the indices of all other patches, in ascending order.

    Args:
        excluded: Indices to leave out, all different within a row.
        patches: Number of patches.
    """
    taken = torch.zeros(len(excluded), patches, dtype=torch.long, device=excluded.device).scatter(1, excluded, 1)
    return taken.argsort(dim=1, stable=True)[:, : patches - excluded.shape[1]]
