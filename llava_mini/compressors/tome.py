"""Token merging: the most similar patches are averaged until C x C are left."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from . import Compressor, grid_side, register


@register("tome")
class TokenMergingCompressor(Compressor):
    """Bipartite soft matching (Token Merging, arXiv 2210.09461; facebookresearch/ToMe), without parameters.

    Round by round the tokens are split by turns into A and B; each of A names the most similar of B, by the cosine of
    their means; the r pairs of A's with the highest similarity are merged, into the mean of all their patches, until
    n = C x C are left. r is what is over, or half of the tokens where that is less: 576 patches take four rounds to 64.

    Departures: published merging goes on within the tower, a few tokens a layer, by the similarity of attention keys;
    here it is done at once on the tower's output, by its features. Tokens stay in the order of the first patch that each
    holds, in every round and at the end. Which patches merge is not differentiated, the means are.

    Raises:
        ValueError: If the patches form no square grid or a smaller one than C x C.
    """

    def forward(
        self, features: Float[Tensor, "batch patches width"]
    ) -> tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch tokens patches"]]:
        batch, patches, _ = features.shape
        grid_side(patches, self.size)
        # the number of the token that holds a patch
        holder = torch.arange(patches, device=features.device).expand(batch, -1)  # (batch, patches)
        weights = torch.eye(patches, dtype=features.dtype, device=features.device).expand(batch, -1, -1)
        tokens, left = features, patches
        while left > self.size**2:
            merged = min(left - self.size**2, left // 2)
            left -= merged
            holder = match(tokens.detach(), merged).gather(1, holder)
            weights = shares(holder, left, features)
            tokens = weights @ features
        return tokens, weights


def match(tokens: Float[Tensor, "batch tokens width"], merged: int) -> Int[Tensor, "batch tokens"]:
    """The numbers of the tokens after one round that merges so many of them, by the order of the first that each
    new token is made of."""
    count = tokens.shape[1]
    directions = nn.functional.normalize(tokens.float(), dim=-1)
    similarity = directions[:, ::2] @ directions[:, 1::2].transpose(1, 2)  # (batch, a, b)
    best, partner = similarity.max(dim=-1)
    chosen = best.argsort(dim=-1, descending=True, stable=True)[:, :merged]  # (batch, merged), of A
    own = torch.arange(count, device=tokens.device).expand(len(tokens), -1)
    target = own.scatter(1, 2 * chosen, 2 * partner.gather(1, chosen) + 1)  # the token of B, or itself
    first = torch.full_like(target, count).scatter_reduce(1, target, own, "amin").gather(1, target)
    return ((first == own).cumsum(dim=1) - 1).gather(1, first)


def shares(
    holder: Int[Tensor, "batch patches"], tokens: int, features: Tensor
) -> Float[Tensor, "batch tokens patches"]:
    """The weight of each patch in the mean of the token that holds it, in the features' dtype."""
    holds = nn.functional.one_hot(holder, tokens).transpose(1, 2).to(features.dtype)
    return holds / holds.sum(dim=-1, keepdim=True)
