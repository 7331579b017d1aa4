"""PruMerge: the patches that the vision tower attends to most, each merged with those most like it."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from . import Compressor, grid_side, register

# Neighbours merged into a patch, as a share of all: 32 of 576 in the paper.
NEIGHBOURS = 32 / 576


@register("prumerge")
class PruMergeCompressor(Compressor):
    """Adaptive token selection and supplement (LLaVA-PruMerge, arXiv 2403.15388; 42Shawn/LLaVA-PruMerge), without
    parameters.

    Of the patches the n = C x C of highest saliency a are kept. Each kept i takes in its k nearest others N(i), kept ones
    among them, by the cosine of their keys, and becomes sum_j a_j x_j / sum_j a_j over j in {i} and N(i); k is 32 of 576
    patches, and as large a share of any other number, at least one. The tokens are in the row-major order of the patches
    that were kept.

    Departures: n is given, so that a table may compare methods, where the paper keeps the outliers of a, above the third
    quartile by 1.5 interquartile ranges, as many as there are. Saliency and keys are those of the layer whose output is
    compressed, the attention averaged over its heads; the released code takes the last layer's, as one head. That code
    adds the weighted sum of the neighbours, not divided, to the patch, and ends with one token more, of all the patches
    that were not kept; here every token is a mean.

    What is chosen is not differentiated, the means are.

    Raises:
        ValueError: If the patches form no square grid or are fewer than C x C.
    """

    needs = ("saliency", "keys")

    def keep(self, saliency: Float[Tensor, "batch patches"]) -> Int[Tensor, "batch tokens"]:
        """The places of the patches that become tokens, in ascending order."""
        return most(saliency, self.size**2)

    def forward(
        self,
        features: Float[Tensor, "batch patches width"],
        saliency: Float[Tensor, "batch patches"],
        keys: Float[Tensor, "batch patches key_width"],
    ) -> tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch tokens patches"]]:
        patches = features.shape[1]
        grid_side(patches, self.size)
        kept = self.keep(saliency)[..., None]  # (batch, tokens, 1)
        directions = nn.functional.normalize(keys.float(), dim=-1)
        likeness = directions.take_along_dim(kept, dim=1) @ directions.transpose(1, 2)  # (batch, tokens, patches)
        # a patch is the first of its own neighbours, even where another has the same key
        near = likeness.scatter(2, kept, torch.inf).argsort(dim=-1, descending=True, stable=True)
        near = near[..., : 1 + max(1, round(NEIGHBOURS * patches))]
        shares = saliency.float().clamp_min(torch.finfo(torch.float32).tiny)[:, None].expand_as(likeness)
        weights = torch.zeros_like(likeness).scatter(2, near, shares.take_along_dim(near, dim=2))
        weights = (weights / weights.sum(dim=-1, keepdim=True)).to(features.dtype)
        return weights @ features, weights


@register("prumerge_plus")
class PruMergePlusCompressor(PruMergeCompressor):
    """PruMerge+ of the same paper: half of the kept patches, rounded up, are those of highest saliency, the others
    evenly spaced over the picture; all are merged as in [`PruMergeCompressor`].

    Of the R patches that are left in row-major order the m spaced ones are the floor((2i + 1) R / 2m) for i = 0 ... m - 1.
    In training the released code takes as many spaced ones as salient ones, as here, every eighth patch, whether salient
    already or not; in inference three for each outlier.
    """

    def keep(self, saliency: Float[Tensor, "batch patches"]) -> Int[Tensor, "batch tokens"]:
        spaced = self.size**2 // 2
        salient = most(saliency, self.size**2 - spaced)
        left = others(salient, saliency.shape[1])
        step = (2 * torch.arange(spaced, device=left.device) + 1) * left.shape[1] // (2 * max(spaced, 1))
        return torch.cat([salient, left[:, step]], dim=1).sort(dim=1).values


def most(saliency: Float[Tensor, "batch patches"], count: int) -> Int[Tensor, "batch count"]:
    """The places of the highest saliencies, in ascending order; of equal ones the first."""
    return saliency.argsort(dim=1, descending=True, stable=True)[:, :count].sort(dim=1).values


def others(places: Int[Tensor, "batch count"], patches: int) -> Int[Tensor, "batch left"]:
    """The places out of so many that are not among these, which are different ones, in ascending order."""
    taken = torch.zeros(len(places), patches, dtype=torch.long, device=places.device).scatter(1, places, 1)
    return taken.argsort(dim=1, stable=True)[:, : patches - places.shape[1]]
