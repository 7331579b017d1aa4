"""Attention statistics from whole matrices, as the back ends show them."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from probes.attention.statistics import Sums


@torch.no_grad()
def dense_statistics(
    scores: Float[Tensor, "batch heads queries keys"],
    weights: Float[Tensor, "batch heads queries keys"],
    query_groups: Int[Tensor, "batch queries"],
    key_groups: Int[Tensor, "batch keys"],
    targets: tuple[int, ...],
    sources: int,
) -> Sums:
    """Sums of attention mass, entropy and received attention of one layer's call.

    Args:
        scores: Ahead of the softmax, masked: hidden keys have -inf or about the least number of the type.
        weights: After it.
        query_groups: Group of each query.
        key_groups: Group of each key; -1 for one that belongs to none.
        targets: Groups whose queries count.
        sources: How many groups there are.

    A query that sees no key of a source adds nothing to that source's sums and counts.

    Raises:
        RuntimeError: The weights of a query do not sum to 1.
    """
    query_groups, key_groups = query_groups.to(scores.device), key_groups.to(scores.device)
    visible = scores[:, 0] > torch.finfo(scores.dtype).min / 2  # masks have no heads
    attention = weights.float().masked_fill(~visible[:, None], 0.0)
    _check_sums(attention, visible, weights.dtype)
    members = (query_groups[..., None] == query_groups.new_tensor(targets)).float()
    inside = one_hot(key_groups + 1, sources + 1)[..., 1:].float()

    mass = torch.einsum("bhqk,bks->bhqs", attention, inside)
    seen = (torch.einsum("bqk,bks->bqs", visible.float(), inside) > 0).float()
    whole = torch.einsum("bhqs,bks->bhqk", mass, inside)
    shares = attention / whole.masked_fill(whole == 0, 1.0)
    entropy = torch.einsum("bhqk,bks->bhqs", torch.special.entr(shares), inside)
    # Of a source with less mass than this, the small weights have lost their digits.
    faint = (mass < torch.finfo(weights.dtype).tiny / torch.finfo(weights.dtype).eps) & seen[:, None].bool()
    for source in faint.any(dim=2).any(dim=1).any(dim=0).nonzero().flatten().tolist():
        of_source = visible & (key_groups == source)[:, None]
        inner = scores.float().masked_fill(~of_source[:, None], -torch.inf).softmax(dim=-1)
        exact = torch.special.entr(inner).sum(dim=-1)
        entropy[..., source] = torch.where(faint[..., source], exact, entropy[..., source])

    return Sums(
        mass=torch.einsum("bqt,bhqs->bhts", members, mass),
        entropy=torch.einsum("bqt,bhqs->bhts", members, entropy),
        queries=torch.einsum("bqt,bqs->bts", members, seen),
        received=torch.einsum("bqt,bhqk->bhtk", members, attention),
        receivers=torch.einsum("bqt,bqk->btk", members, visible.float()),
    )


def _check_sums(
    attention: Float[Tensor, "batch heads queries keys"],
    visible: Bool[Tensor, "batch queries keys"],
    dtype: torch.dtype,
) -> None:
    sums = attention.sum(dim=-1).movedim(1, -1)[visible.any(dim=-1)]
    # Each weight is rounded once, to at most half an eps of itself.
    if sums.numel() and (sums - 1).abs().max() > max(torch.finfo(dtype).eps, 1e-4):
        raise RuntimeError(
            f"a query's attention weights sum to {float(sums.flatten()[(sums - 1).abs().argmax()]):.3g}, not 1: "
            "the back end shows them with dropout, an attention sink or an edit; use model.eval() or backend='native'"
        )
