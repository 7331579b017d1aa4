"""Clusters of dropped tokens, each summed into one token (SparseVLM's token recycling)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

NEIGHBOURS = 5
"""Nearest neighbours that define the density at a token."""


def recycle_tokens(
    states: Float[Tensor, "batch positions width"],
    pool: Bool[Tensor, "batch positions"],
    clusters: Int[Tensor, "batch 1"],
) -> tuple[Float[Tensor, "batch positions width"], Bool[Tensor, "batch positions"]]:
    """Sum the tokens of each cluster into the token at its centre.

    The clusters are those of density peaks with nearest neighbours (DPC-KNN, Du et al. 2016):

    ```
    density_i = exp(-mean of |h_i - h_j|^2 / width over the 5 nearest others j)
    height_i  = least |h_i - h_j| over all j of higher density, or the largest if there is none
    ```

    Centres are the tokens of largest density times height. Every other token joins the nearest centre. Of equal values
    the first token wins.

    Args:
        states: Hidden states `h`.
        pool: The tokens to cluster; a row may have none.
        clusters: Number of clusters of each row, at most the number of its tokens.

    Returns:
        The states, with the sums at the centres, and the mask of the centres.
    """
    size = int(pool.sum(dim=1).max())
    if not size or not clusters.any():
        return states, torch.zeros_like(pool)
    index = (~pool).long().argsort(dim=1, stable=True)[:, :size]  # the tokens of each row, then filler
    member = pool.gather(1, index)
    vectors = states.take_along_dim(index[..., None], dim=1).float()
    # not torch.cdist's matrix products, whose rounding errors would separate equal tokens
    distance = torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist")
    pairs = member[:, :, None] & member[:, None, :]
    score = _density_peaks(distance, pairs, vectors.shape[-1])
    rank = score.masked_fill(~member, -torch.inf).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    is_centre = member & (rank < clusters)
    itself = torch.eye(size, dtype=torch.bool, device=states.device)
    to_centre = distance.masked_fill(itself, -1).masked_fill(~is_centre[:, None, :], torch.inf)
    nearest = to_centre.argmin(dim=2)
    joins = (torch.nn.functional.one_hot(nearest, size) * member[..., None]).to(vectors)  # (batch, tokens, centres)
    sums = joins.transpose(1, 2) @ vectors
    merged = torch.where(is_centre[..., None], sums, vectors).to(states.dtype)
    return (
        states.scatter(1, index[..., None].expand_as(merged), merged),
        torch.zeros_like(pool).scatter(1, index, is_centre),
    )


def _density_peaks(
    distance: Float[Tensor, "batch tokens tokens"], pairs: Bool[Tensor, "batch tokens tokens"], width: int
) -> Float[Tensor, "batch tokens"]:
    """Return density times height of each token.

    Args:
        distance: Distance of every two tokens.
        pairs: Which pairs exist in their row.
        width: Width of the states.
    """
    size = distance.shape[1]
    others = pairs & ~torch.eye(size, dtype=torch.bool, device=distance.device)
    squares = distance.square().masked_fill(~others, torch.inf)
    nearest = squares.topk(min(NEIGHBOURS, size), dim=2, largest=False).values
    exists = nearest.isfinite()
    density = (-nearest.masked_fill(~exists, 0).sum(dim=2) / exists.sum(dim=2).clamp(min=1) / width).exp()
    earlier = torch.ones(size, size, dtype=torch.bool, device=distance.device).tril(-1)
    higher = (density[:, None, :] > density[:, :, None]) | ((density[:, None, :] == density[:, :, None]) & earlier)
    higher &= others
    least = distance.masked_fill(~higher, torch.inf).amin(dim=2)
    largest = distance.masked_fill(~others, 0).amax(dim=2)
    return density * torch.where(higher.any(dim=2), least, largest)
