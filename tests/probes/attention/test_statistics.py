"""`group_statistics` of one call against closed forms, and of random scores against their definition in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probes.attention import layout as attention_layout
from probes.attention.group_sums import GroupSums
from probes.attention.layout import GroupLayout
from probes.attention.statistics import AttentionCall, group_statistics
from probes.attention.visibility import Visibility

CAUSAL = Visibility(offset=0)


def sum_call(
    query: torch.Tensor,
    key: torch.Tensor,
    queries: torch.Tensor,
    keys: torch.Tensor,
    targets: tuple[int, ...],
    sources: tuple[int, ...],
    visible: Visibility = CAUSAL,
    **kwargs: Any,
) -> GroupSums:
    layout = GroupLayout.build(queries, keys, targets, sources, visible, query.shape[1], key.shape[1])
    return group_statistics(AttentionCall(query, key, 1.0, **kwargs), layout)


def test_group_statistics_under_autocast_stay_float32() -> None:
    query, key = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    labels = torch.zeros(1, 5, dtype=torch.long)
    plain = sum_call(query, key, labels, labels, (0,), (0,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = sum_call(query, key, labels, labels, (0,), (0,))
    assert torch.equal(plain.entropy, cast.entropy)


def test_group_statistics_mass_below_float32_minimum_has_entropy() -> None:
    """A source with exp(-200) of the attention has mass 0 in float32; the entropy within it is still log 2."""
    key = torch.tensor([[[[0.0], [0.0], [200.0]]]])
    labels = torch.tensor([[0, 0, 1]])
    sums = sum_call(torch.ones(1, 1, 3, 1), key, labels, labels, (1,), (0, 1))
    torch.testing.assert_close(sums.mass.flatten(), torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(sums.entropy.flatten(), torch.tensor([math.log(2.0), 0.0]))


def test_group_statistics_sink_takes_attention_from_every_source() -> None:
    """Scores 0 and 0 and a sink of log 2: each key gets a quarter of the attention, and the sink half."""
    labels, sink = torch.tensor([[0, 1]]), torch.tensor([math.log(2.0)])
    zeros = torch.zeros(1, 1, 2, 1)
    sums = sum_call(zeros, zeros, labels, labels, (1,), (0, 1), sinks=sink)
    torch.testing.assert_close(sums.mass.flatten(), torch.tensor([0.25, 0.25]))
    torch.testing.assert_close(sums.received.flatten(), torch.tensor([0.25, 0.25]))


def test_group_statistics_softcap_bounds_scores() -> None:
    """Scores 100 and -100 under a cap of 1 are tanh(100) and tanh(-100): 1 and -1."""
    key = torch.tensor([[[[100.0], [-100.0]]]])
    labels = torch.tensor([[0, 1]])
    sums = sum_call(torch.ones(1, 1, 2, 1), key, labels, labels, (1,), (0, 1), softcap=1.0)
    share = 1 / (1 + math.exp(-2))
    torch.testing.assert_close(sums.mass.flatten(), torch.tensor([share, 1 - share]))


def expected_sums(scores: torch.Tensor, member: torch.Tensor, source: torch.Tensor, visible: torch.Tensor) -> Any:
    """Return the sums for one sample and head in float64: mass, entropy, queries, received, receivers.

    `source` is `[sources, keys]`.
    """
    weights = scores.double().masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0.0)
    mass = weights @ source.double().T
    entropies = []
    for keys in source:
        part = scores.double().masked_fill(~(visible & keys), -torch.inf).softmax(-1).nan_to_num(0.0)
        entropies.append(torch.special.entr(part).sum(-1))
    has_visible_key = (visible[:, None] & source).any(-1).double()
    rows = member.double()
    return (
        rows @ mass,
        rows @ torch.stack(entropies, -1),
        rows @ has_visible_key,
        rows @ weights,
        rows @ visible.double(),
    )


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**20),
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    length=st.integers(1, 12),
    past=st.integers(0, 5),
    mask_type=st.sampled_from(["causal", "bool", "additive", "biased", "none"]),
    score_limit=st.sampled_from([1, 40, 2**20]),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
)
def test_group_statistics_any_call_equals_definition(
    seed: int,
    batch: int,
    kv_heads: int,
    group: int,
    length: int,
    past: int,
    mask_type: str,
    score_limit: int,
    scale: float,
) -> None:
    """Groups in any order, any mask, rows without a visible key, any chunk size."""
    draw = torch.Generator().manual_seed(seed)
    past = 0 if mask_type == "causal" else past
    keys = torch.randint(-1, 3, (batch, past + length), generator=draw)
    queries = torch.randint(0, 3, (batch, length), generator=draw)
    query = torch.randn(batch, kv_heads * group, length, 4, generator=draw) * scale
    key = torch.randn(batch, kv_heads, past + length, 4, generator=draw)
    if mask_type in ("causal", "none"):
        keys = keys.clamp(min=0)  # only a mask can hide keys of no group, as the empty slots of a static cache
    visible_keys = (torch.rand(batch, 1, length, past + length, generator=draw) < 0.6) & (keys >= 0)[:, None, None]
    bias = torch.randn(visible_keys.shape, generator=draw) if mask_type == "biased" else torch.zeros(visible_keys.shape)
    visible = Visibility(bias.masked_fill(~visible_keys, torch.finfo(torch.float32).min))
    if mask_type == "bool":
        visible = Visibility(visible_keys)
    elif mask_type == "none":
        visible_keys, visible = torch.ones_like(visible_keys), Visibility()
    elif mask_type == "causal":
        visible_keys, visible = torch.ones_like(visible_keys).tril(), CAUSAL

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_layout, "SCORES_PER_CHUNK", score_limit)
        sums = sum_call(query, key, queries, keys, (2, 0), (0, 1, 2), visible)
    scores = query @ key.repeat_interleave(group, 1).mT + bias
    for sample in range(batch):
        member = torch.stack([queries[sample] == 2, queries[sample] == 0])
        source = torch.stack([keys[sample] == index for index in range(3)])
        for head in range(kv_heads * group):
            mass, entropy, count, received, receivers = expected_sums(
                scores[sample, head], member, source, visible_keys[sample, 0]
            )
            for actual, expected in (
                (sums.mass[sample, head], mass),
                (sums.entropy[sample, head], entropy),
                (sums.queries[sample], count),
                (sums.received[sample, head], received),
                (sums.receivers[sample], receivers),
            ):
                torch.testing.assert_close(actual.double(), expected, atol=2e-4, rtol=1e-5)
