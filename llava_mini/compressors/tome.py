"""Token merging: the most similar patches are averaged until C x C tokens are left."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..full_precision import without_autocast
from . import Compressor, grid_side, register


@register("tome")
class TokenMergingCompressor(Compressor):
    """Merge similar patches by bipartite soft matching, without parameters.

    Source: Token Merging, arXiv 2210.09461; facebookresearch/ToMe.

    One round, repeated until n = C x C tokens are left:

    1. Split the tokens alternately into the sets A and B.
    2. Match each token of A to the most similar token of B, by the cosine of their means.
    3. Merge the r matches of highest similarity. A merged token is the mean of all its patches.

    r is the number of tokens above n, or half of the tokens if that is less: 576 patches take four rounds to 64.

    Departures: published merging happens inside the vision tower, a few tokens per layer, by the similarity of
    attention keys. Here it happens at once on the tower's output, by its features. Tokens stay in the order of the first
    patch that each holds, in every round and at the end.

    Gradients pass through the means, not through the choice of patches.

    Shapes:
        features (batch, S * S, width) -> tokens (batch, C * C, width), weights (batch, C * C, S * S)

    Raises:
        ValueError: If the patches form no square grid, or one smaller than C x C.
    """

    @without_autocast
    def forward(
        self, features: Float[Tensor, "batch patches width"]
    ) -> tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch tokens patches"]]:
        batch, patches, _ = features.shape
        grid_side(patches, self.size)
        # the index of the token that holds each patch
        token_indices = torch.arange(patches, device=features.device).expand(batch, -1)  # (batch, patches)
        weights = torch.eye(patches, dtype=features.dtype, device=features.device).expand(batch, -1, -1)
        tokens, count = features, patches
        while count > self.size**2:
            merges = min(count - self.size**2, count // 2)
            count -= merges
            token_indices = merged_token_indices(tokens.detach(), merges).gather(1, token_indices)
            weights = mean_weights(token_indices, count, features)
            tokens = weights @ features
        return tokens, weights


def merged_token_indices(tokens: Float[Tensor, "batch tokens width"], merges: int) -> Int[Tensor, "batch tokens"]:
    """Return the index that each token has after one round of merging.

    New tokens are numbered in the order of the first token that each is made of.

    Args:
        tokens: The tokens before the round.
        merges: Number of pairs to merge.
    """
    count = tokens.shape[1]
    directions = nn.functional.normalize(tokens.float(), dim=-1)
    similarity = directions[:, ::2] @ directions[:, 1::2].transpose(1, 2)  # (batch, a, b)
    best, partner = similarity.max(dim=-1)
    chosen = best.argsort(dim=-1, descending=True, stable=True)[:, :merges]  # (batch, merges), indices into A
    own = torch.arange(count, device=tokens.device).expand(len(tokens), -1)
    target = own.scatter(1, 2 * chosen, 2 * partner.gather(1, chosen) + 1)  # the token of B, or the token itself
    first = torch.full_like(target, count).scatter_reduce(1, target, own, "amin").gather(1, target)
    return ((first == own).cumsum(dim=1) - 1).gather(1, first)


def mean_weights(
    token_indices: Int[Tensor, "batch patches"], tokens: int, features: Tensor
) -> Float[Tensor, "batch tokens patches"]:
    """Return the weight of each patch in the mean of the token that holds it.

    Args:
        token_indices: The index of the token that holds each patch.
        tokens: Number of tokens.
        features: A tensor that gives the dtype of the result.
    """
    members = nn.functional.one_hot(token_indices, tokens).transpose(1, 2).to(features.dtype)
    return members / members.sum(dim=-1, keepdim=True)
