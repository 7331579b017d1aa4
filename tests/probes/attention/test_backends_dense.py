"""`dense_statistics` against sums over single weights in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from probes.attention.backends.dense import dense_statistics

SOURCES = 3


def sum_over_weights(scores: Tensor, visible: Tensor, query_groups: Tensor, key_groups: Tensor) -> dict[str, Tensor]:
    """Return the sums, query by query; every group is a target."""
    batch, heads, queries, keys = scores.shape
    mass, entropy = torch.zeros(2, batch, heads, SOURCES, SOURCES, dtype=torch.float64)
    count = torch.zeros(batch, SOURCES, SOURCES, dtype=torch.float64)
    received = torch.zeros(batch, heads, SOURCES, keys, dtype=torch.float64)
    receivers = torch.zeros(batch, SOURCES, keys, dtype=torch.float64)
    for b in range(batch):
        for q in range(queries):
            target = int(query_groups[b, q])
            visible_keys = visible[b, q].nonzero().flatten().tolist()
            receivers[b, target, visible_keys] += 1
            for source in range(SOURCES):
                inside = [k for k in visible_keys if key_groups[b, k] == source]
                count[b, target, source] += bool(inside)
                for h in range(heads):
                    weights = scores[b, h, q, visible_keys].double().softmax(0)
                    mass[b, h, target, source] += sum(weights[visible_keys.index(k)] for k in inside)
                    for share in scores[b, h, q, inside].double().softmax(0).tolist():
                        entropy[b, h, target, source] -= share * math.log(share) if share else 0.0
            for h in range(heads):
                received[b, h, target, visible_keys] += scores[b, h, q, visible_keys].double().softmax(0)
    return {"mass": mass, "entropy": entropy, "queries": count, "received": received, "receivers": receivers}


@given(
    seed=st.integers(0, 10**6),
    size=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 4), st.integers(1, 7)),
    spread=st.sampled_from([0.1, 3.0, 100.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_dense_statistics_any_mask_equals_sums_over_weights(
    seed: int, size: tuple[int, int, int, int], spread: float, dtype: torch.dtype
) -> None:
    """Any mask, empty cache slots, queries without a visible key, and attention too small for the weights' type."""
    random = torch.Generator().manual_seed(seed)
    batch, _, queries, keys = size
    scores = (torch.randn(size, generator=random) * spread).to(dtype)
    visible = torch.rand(batch, queries, keys, generator=random) > 0.3
    query_groups = torch.randint(0, SOURCES, (batch, queries), generator=random)
    key_groups = torch.randint(-1, SOURCES, (batch, keys), generator=random)
    masked = scores + torch.where(visible, 0.0, torch.finfo(dtype).min).to(dtype)[:, None]
    weights = masked.softmax(dim=-1, dtype=torch.float32).to(dtype)

    sums = dense_statistics(masked, weights, query_groups, key_groups, tuple(range(SOURCES)), SOURCES)
    rounding = 1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps * queries
    for name, expected in sum_over_weights(scores, visible, query_groups, key_groups).items():
        tolerance = 0.0 if name in ("queries", "receivers") else rounding
        torch.testing.assert_close(getattr(sums, name).double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("dtype", "least"), [(torch.float32, -200.0), (torch.bfloat16, -200.0), (torch.float16, -12.0)]
)
def test_dense_statistics_attention_below_type_minimum_has_exact_entropy(dtype: torch.dtype, least: float) -> None:
    """Two keys share a tiny mass evenly; the other two share the rest at 1 to 3."""
    scores = torch.tensor([least, least, 0.0, math.log(3.0)], dtype=dtype)[None, None, None]
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(dtype)
    sums = dense_statistics(scores, weights, torch.tensor([[0]]), torch.tensor([[0, 0, 1, 1]]), (0,), 2)
    expected = torch.tensor([math.log(2.0), math.log(4.0) - 0.75 * math.log(3.0)])
    torch.testing.assert_close(sums.entropy.flatten(), expected, rtol=0, atol=2 * torch.finfo(dtype).eps)


def test_dense_statistics_selected_targets_are_subset_of_all() -> None:
    scores, groups = torch.randn(1, 2, 5, 5), torch.tensor([[0, 1, 2, 1, 0]])
    all_targets = dense_statistics(scores, scores.softmax(-1), groups, groups, (0, 1, 2), SOURCES)
    selected = dense_statistics(scores, scores.softmax(-1), groups, groups, (2, 0), SOURCES)
    for name in ("mass", "entropy", "received"):
        assert torch.equal(getattr(selected, name), getattr(all_targets, name)[:, :, [2, 0]])
    assert torch.equal(selected.queries, all_targets.queries[:, [2, 0]])


@pytest.mark.parametrize("spoil", [lambda weights: weights * 2, lambda weights: weights * (weights < weights.max())])
def test_dense_statistics_weights_that_do_not_sum_to_1_raise(spoil: Callable[[Tensor], Tensor]) -> None:
    scores, groups = torch.randn(1, 1, 3, 3), torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(RuntimeError, match=r"attention weights sum to .*, not 1"):
        dense_statistics(scores, spoil(scores.softmax(-1)), groups, groups, (0,), 1)
