"""Attention statistics by token group from whole attention matrices, which the back ends expose."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from probes.attention.group_sums import GroupSums


@torch.no_grad()
def dense_statistics(
    scores: Float[Tensor, "batch heads queries keys"],
    weights: Float[Tensor, "batch heads queries keys"],
    query_groups: Int[Tensor, "batch queries"],
    key_groups: Int[Tensor, "batch keys"],
    targets: tuple[int, ...],
    sources: int,
) -> GroupSums:
    """Return the sums of attention mass, entropy and received attention of one layer's call.

    A query that cannot attend to any key of a source adds nothing to that source's sums and counts.

    Args:
        scores: Masked scores before the softmax: hidden keys have -inf or about the minimum of the type.
        weights: Attention weights after the softmax.
        query_groups: Group of each query.
        key_groups: Group of each key; -1 for a key of no group.
        targets: Groups whose queries count.
        sources: Number of groups.

    Returns:
        The sums, with an axis of `targets` and one of all groups, by key of the call.

    Raises:
        RuntimeError: The weights of a query do not sum to 1.
    """
    query_groups, key_groups = query_groups.to(scores.device), key_groups.to(scores.device)
    visible = scores[:, 0] > torch.finfo(scores.dtype).min / 2  # masks have no axis of heads
    attention = weights.float().masked_fill(~visible[:, None], 0.0)
    _check_weights_sum_to_one(attention, visible, weights.dtype)
    is_target = (query_groups[..., None] == query_groups.new_tensor(targets)).float()
    is_source = one_hot(key_groups + 1, sources + 1)[..., 1:].float()

    mass = torch.einsum("bhqk,bks->bhqs", attention, is_source)
    sees_source = (torch.einsum("bqk,bks->bqs", visible.float(), is_source) > 0).float()
    mass_by_key = torch.einsum("bhqs,bks->bhqk", mass, is_source)
    shares = attention / mass_by_key.masked_fill(mass_by_key == 0, 1.0)
    entropy = torch.einsum("bhqk,bks->bhqs", torch.special.entr(shares), is_source)
    # In a source with less mass than this, the small weights have lost their digits: compute the shares from scores.
    lost_digits = (mass < torch.finfo(weights.dtype).tiny / torch.finfo(weights.dtype).eps) & sees_source[
        :, None
    ].bool()
    for source in lost_digits.any(dim=2).any(dim=1).any(dim=0).nonzero().flatten().tolist():
        visible_source = visible & (key_groups == source)[:, None]
        source_shares = scores.float().masked_fill(~visible_source[:, None], -torch.inf).softmax(dim=-1)
        exact = torch.special.entr(source_shares).sum(dim=-1)
        entropy[..., source] = torch.where(lost_digits[..., source], exact, entropy[..., source])

    return GroupSums(
        mass=torch.einsum("bqt,bhqs->bhts", is_target, mass),
        entropy=torch.einsum("bqt,bhqs->bhts", is_target, entropy),
        queries=torch.einsum("bqt,bqs->bts", is_target, sees_source),
        received=torch.einsum("bqt,bhqk->bhtk", is_target, attention),
        receivers=torch.einsum("bqt,bqk->btk", is_target, visible.float()),
    )


def _check_weights_sum_to_one(
    attention: Float[Tensor, "batch heads queries keys"],
    visible: Bool[Tensor, "batch queries keys"],
    dtype: torch.dtype,
) -> None:
    sums = attention.sum(dim=-1).movedim(1, -1)[visible.any(dim=-1)]
    # Each weight is rounded once, by at most half an eps of itself.
    if sums.numel() and (sums - 1).abs().max() > max(torch.finfo(dtype).eps, 1e-4):
        raise RuntimeError(
            f"a query's attention weights sum to {float(sums.flatten()[(sums - 1).abs().argmax()]):.3g}, not 1: "
            "the back end reports them with dropout, an attention sink or an edit; use model.eval() or backend='native'"
        )
