"""Sinks: limits against scipy, rates against a definition in float64, planted sinks, and models without any."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from probes import TokenMap, record_attention
from probes.attention import layout
from probes.attention.outliers import SINK_LEVEL, SINK_SHARE, outlier_limits
from probes.attention.sinks import SINK_STATISTICS, find_sinks
from tests.probes.attention_reference import expected_statistics
from tests.tiny_models import IMAGE_TOKEN, tiny_llama

PATCHES = 36
SYSTEM, TEXT = 3, 9
SINK = 40


def prompts(
    count: int, patches: int = PATCHES, seed: int = 0, vocabulary: int = IMAGE_TOKEN + 1
) -> tuple[torch.Tensor, TokenMap]:
    """Return random prompts whose visual tokens are ordinary tokens of the vocabulary, without the planted sink."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, vocabulary, (count, SYSTEM + patches + TEXT), generator=generator)
    ids[ids == SINK] = SINK + 1
    labels = torch.tensor([[1] * SYSTEM + [2] * patches + [3] * TEXT]).expand(count, -1)
    return ids, TokenMap(labels)


def plant_sinks(model: Any, token: int, strength: float = 5.0) -> None:
    """Make every head of every layer attend to `token`, whose value is small.

    One dimension of the residual stream holds the mark of the token and is large, so that it also makes the rest of the
    token's normalised state small. All other tokens have the same constant in a second dimension, which all queries
    read.
    """
    mark, constant = 0, 1
    embeddings = model.get_input_embeddings().weight
    embeddings[:, mark], embeddings[token, mark] = 0.0, 100.0
    embeddings[:, constant] = 3.0
    for layer in model.model.layers:
        attention = layer.self_attn
        for projection in (attention.o_proj, layer.mlp.down_proj):
            projection.weight[[mark, constant]] = 0.0
        attention.v_proj.weight[:, mark] = 0.0
        # The last pair of a head's dimensions rotates least.
        slow = torch.arange(attention.head_dim - 1, attention.q_proj.out_features, attention.head_dim)
        attention.q_proj.weight[slow, constant] += strength
        slow = torch.arange(attention.head_dim - 1, attention.k_proj.out_features, attention.head_dim)
        attention.k_proj.weight[slow, mark] += strength


def sinks_of(model: Any, ids: torch.Tensor, tokens: TokenMap) -> Any:
    with (
        torch.no_grad(),
        record_attention(model, tokens, targets=["instruction"], statistics=SINK_STATISTICS) as record,
    ):
        model(ids)
    return find_sinks(record, tokens)


@pytest.mark.parametrize("count", [8, 16, 36, 144, 576, 2880])
def test_outlier_limits_equal_quantiles_of_student_t(count: int) -> None:
    expected = stats.t.isf(SINK_LEVEL * SINK_SHARE / count, 0.37 * count)
    assert float(outlier_limits(count)[count]) == pytest.approx(expected, rel=0.05)
    assert math.isinf(outlier_limits(count)[7])


@torch.no_grad()
@pytest.mark.parametrize("scores", [2**20, 500])
def test_sink_rate_equals_definition(monkeypatch: pytest.MonkeyPatch, scores: int) -> None:
    """From log-attention, whose differences are those of scores; vision queries attend to a part of the image."""
    monkeypatch.setattr(layout, "SCORES_PER_CHUNK", scores)
    ids, tokens = prompts(2)
    model = tiny_llama()
    with record_attention(model, tokens, statistics=["sink_rate"]) as record:
        model(ids)
    attentions = torch.stack(tiny_llama("eager")(ids, output_attentions=True).attentions).double().log().numpy()
    expected = np.full(tuple(record.sink_rate.shape), np.nan)
    limits = {n: stats.t.isf(SINK_LEVEL * SINK_SHARE / n, 0.37 * n) for n in range(8, PATCHES + 1)}
    labels = tokens.labels.numpy()
    near_limit = 0
    for layer, sample, head, target in np.ndindex(expected.shape[:4]):
        queries = np.flatnonzero(labels[sample] == tokens.index(record.targets[target]))
        for source in (1, 2, 3):
            for position in np.flatnonzero(labels[sample] == source):
                outcomes = []
                for query in queries[queries >= position]:
                    keys = np.flatnonzero((labels[sample] == source) & (np.arange(ids.shape[1]) <= query))
                    values = attentions[layer, sample, head, query, keys]
                    middle = np.sort(values)[(len(values) - 1) // 2]
                    deviation = 1.4826 * np.sort(abs(values - middle))[(len(values) - 1) // 2]
                    limit = limits[len(keys)] * deviation if len(keys) >= 8 else math.inf
                    excess = attentions[layer, sample, head, query, position] - middle
                    outcomes.append(excess >= max(math.log(10), limit))
                    near_limit += abs(excess - max(math.log(10), limit)) < 0.02 * abs(excess)
                if outcomes:
                    expected[layer, sample, head, target, position] = np.mean(outcomes)
    actual = record.sink_rate.numpy()
    assert (np.isnan(actual) == np.isnan(expected)).all()
    different = ~np.isclose(actual, expected, atol=1e-6, equal_nan=True)
    assert different.sum() <= near_limit, "only where the quantile's approximation decides"
    assert different.mean() < 0.01
    assert np.nanmax(expected) > 0


@torch.no_grad()
@pytest.mark.parametrize("sinks", [(5,), (0, 35), (3, 4, 30)])
@pytest.mark.parametrize("seed", range(4))
def test_find_sinks_of_planted_model_are_planted_positions(sinks: tuple[int, ...], seed: int) -> None:
    model, token = tiny_llama(seed=seed), SINK
    plant_sinks(model, token)
    ids, tokens = prompts(3, seed=seed)
    positions = [SYSTEM + sink for sink in sinks]
    ids[:2, positions] = token  # the third prompt has none
    found = sinks_of(model, ids, tokens)
    planted = (ids == token)[None].expand_as(found.by_attention)
    assert torch.equal(found.by_attention, planted)
    assert torch.equal(found.by_value & planted, planted)
    assert (found.value_ratio[planted] < 0.5).all()
    assert (found.rate[planted] > 0.9).all()
    frame = found.frame().query("by_attention")
    assert sorted(set(zip(frame["sample"], frame["position"], strict=True))) == [
        (sample, position) for sample in range(2) for position in positions
    ]


@torch.no_grad()
def test_sinks_leave_out_takes_them_from_mass_and_entropy() -> None:
    model, eager, token = tiny_llama(), tiny_llama("eager"), SINK
    plant_sinks(model, token, strength=2.0)  # all weights stay above the smallest float32
    plant_sinks(eager, token, strength=2.0)
    ids, tokens = prompts(2)
    ids[0, SYSTEM + 7] = token
    without = sinks_of(model, ids, tokens).leave_out(tokens)
    labels = tokens.labels.clone()
    labels[0, SYSTEM + 7] = 5
    assert torch.equal(without.labels, labels)
    with record_attention(model, without, targets=["instruction"]) as record:
        model(ids)
    expected = expected_statistics(eager(ids, output_attentions=True).attentions, without, ["instruction"])
    np.testing.assert_allclose(record.mass.numpy(), expected["mass"], atol=1e-5)
    np.testing.assert_allclose(record.entropy.numpy(), expected["entropy"], atol=1e-4)
    assert (record.mass[0, 0, :, 0, without.index("sink")] > 0.9).all()
    assert record.mass[:, 1, :, 0, without.index("sink")].isnan().all()


@pytest.mark.parametrize("patches", [9, 36, 144])
def test_find_sinks_of_random_models_finds_none_in_95_percent(patches: int) -> None:
    """The level is for each layer and sample: 40 models, 3 layers and 4 samples."""
    by_attention = by_value = cases = 0
    for seed in range(40):
        ids, tokens = prompts(4, patches, seed, vocabulary=1024)
        found = sinks_of(tiny_llama(seed=seed, vocab_size=1024), ids, tokens)
        by_attention += int(found.by_attention.any(-1).sum())
        by_value += int(found.by_value.any(-1).sum())
        cases += found.by_attention[..., 0].numel()
    assert cases == 480
    assert by_attention <= 0.05 * cases
    assert by_value <= 0.05 * cases


@torch.no_grad()
def test_find_sinks_with_invalid_arguments_raises_error(make_llama: Callable[..., Any]) -> None:
    model, (ids, tokens) = make_llama(), prompts(2)
    with record_attention(model, tokens, targets=["instruction"], statistics=SINK_STATISTICS) as record:
        model(ids)
    with pytest.raises(ValueError, match=r"target is 'system'.*instruction"):
        find_sinks(record, tokens, target="system")
    with pytest.raises(ValueError, match="group 'question'"):
        find_sinks(record, tokens, source="question")
    with pytest.raises(ValueError, match=r"\[3, 48\].*\[2, 48\]"):
        find_sinks(record, prompts(3)[1])
    with record_attention(model, tokens) as record:
        model(ids)
    with pytest.raises(RuntimeError, match="value_norm was not recorded"):
        find_sinks(record, tokens)
