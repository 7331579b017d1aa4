"""Contribution and visual sinks in records, against explicit computations and on a model with a planted sink."""

import math
import types

import numpy as np
import pytest
import torch

from experiments.config.schema import ProbeConfig
from experiments.data.samples import single_questions
from experiments.evaluation.attention_by_layer import TOKEN_GROUP_PAIRS, measure_attention, share_of_norms
from experiments.evaluation.questions import EncodedQuestions, instruction_token_map
from tests.probes.attention.test_sinks import plant_sinks

CPU = torch.device("cpu")
SINK = 3  # number of the visual token


@pytest.fixture
def questions(shapes_split, processor):
    return EncodedQuestions(list(single_questions(shapes_split.samples))[:6], processor, 4, CPU)


def expected_norms(model, inputs, tokens):
    """Return the norm of what each source adds for each query, [layers, heads, queries, sources], from whole matrices."""
    inputs = {name: values for name, values in inputs.items() if name != "labels"}
    language = model.model.language_model
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(**inputs, output_attentions=True, output_hidden_states=True)
    norms = []
    for layer, attention, hidden in zip(language.layers, output.attentions, output.hidden_states[:-1], strict=True):
        module = layer.self_attn
        heads, width = attention.shape[1], module.head_dim
        value = module.v_proj(layer.input_layernorm(hidden[0])).view(len(hidden[0]), -1, width)
        value = value.repeat_interleave(heads // value.shape[1], dim=1)
        weight = module.o_proj.weight.view(-1, heads, width)
        added = torch.einsum("khd,ohd->kho", value, weight)  # what each key adds with attention 1
        by_source = [
            torch.einsum("hqk,kho->hqo", attention[0] * tokens.mask(name)[0], added).norm(dim=-1)
            for name in tokens.groups
        ]
        norms.append(torch.stack(by_source, -1))
    return torch.stack(norms).detach()


def test_measure_attention_contribution_equals_whole_matrices(deep_llava, shapes_split, processor):
    questions = EncodedQuestions(list(single_questions(shapes_split.samples))[:2], processor, 1, CPU)
    config = ProbeConfig(attention=True, contribution=True)
    part = measure_attention(deep_llava, questions, config)["contribution"]
    shares, by_head = [], []
    for inputs in questions.batches("all"):
        tokens = instruction_token_map(deep_llava, inputs)
        norms = expected_norms(deep_llava, inputs, tokens)
        for target, source in TOKEN_GROUP_PAIRS:
            can_see = tokens.mask(target)[0] & (tokens.mask(source)[0].cumsum(0) > 0)
            columns = [name for name in tokens.groups if tokens.mask(name).any()]
            means = {}
            for name in columns:
                queries = tokens.mask(target)[0] & (tokens.mask(name)[0].cumsum(0) > 0)
                if queries.any():
                    means[name] = norms[:, :, queries, tokens.index(name)].mean(2)  # layers, heads
            assert can_see.any()
            total = sum(mean.mean(1) for mean in means.values())
            shares.append(means[source].mean(1) / total)
            by_head.append(means[source])
    pairs, layers = len(TOKEN_GROUP_PAIRS), 4
    expected = torch.stack(shares).view(2, pairs, layers).permute(1, 2, 0)
    assert np.asarray(part["share"]) == pytest.approx(expected.numpy(), abs=2e-4)
    expected = torch.stack(by_head).view(2, pairs, layers, -1).mean(0)
    assert np.asarray(part["by_head"]) == pytest.approx(expected.numpy(), rel=1e-3, abs=1e-5)


def test_share_of_norms_without_any_contribution_is_zero():
    norms = torch.tensor([[0.0, 0.0, torch.nan], [1.0, 3.0, torch.nan]]).view(2, 1, 1, 1, 3)
    found = share_of_norms(norms).view(2, 3)
    assert found[:, :2].tolist() == [[0.0, 0.0], [0.25, 0.75]]
    assert found[:, 2].isnan().all()


def plant_visual_sink(model):
    """Make every layer attend to visual token 3 of each image, whose value is small."""
    language = model.model.language_model
    plant_sinks(types.SimpleNamespace(get_input_embeddings=model.get_input_embeddings, model=language), token=0)

    def mark(module, args, features):
        features = features.clone()
        features[..., 0], features[..., 1] = 0.0, 3.0
        features[..., SINK, 0] = 100.0
        return features

    model.model.multi_modal_projector.register_forward_hook(mark)


def test_measure_attention_finds_the_planted_visual_sink_in_every_layer(llava, questions):
    with torch.no_grad():
        plant_visual_sink(llava)
    sinks = measure_attention(llava, questions, ProbeConfig(attention=True, sinks=True))["sinks"]
    assert np.unique(sinks["by_attention"]).tolist() == [1]
    assert np.unique(sinks["by_value"]).tolist() == [1]
    assert sinks["tokens"] == [[float(token == SINK) for token in range(9)]] * 2
    assert np.shape(sinks["mass"]) == (2, 2, 6)
    assert np.min(sinks["mass"]) > 0.2


def test_measure_attention_without_sinks_counts_all_other_attention(llava, questions):
    with torch.no_grad():
        plant_visual_sink(llava)
    with_sinks = measure_attention(llava, questions, ProbeConfig(attention=True, sinks=True))
    without = measure_attention(llava, questions, ProbeConfig(attention=True, leave_out_sinks=True))
    assert (with_sinks["sinks"]["left_out"], without["sinks"]["left_out"]) == (False, True)
    assert without["sinks"] | {"left_out": False} == with_sinks["sinks"]
    for index, (target, source) in enumerate(TOKEN_GROUP_PAIRS):
        before, after = (np.asarray(parts["attention"]["mass"][index]) for parts in (with_sinks, without))
        on_sinks = np.asarray(with_sinks["sinks"]["mass"][("instruction", "response").index(target)])
        assert after == pytest.approx(before - on_sinks * (source == "vision"), abs=1e-4)
    # Attention within the eight other tokens is nearly even.
    entropy = np.asarray(without["attention"]["entropy"][0])
    assert (entropy > 0.95 * math.log(8)).all()
    assert (entropy <= math.log(8) + 1e-4).all()
    assert (np.asarray(with_sinks["attention"]["entropy"][0]) < entropy).all()
    assert without["attention"]["uniform_entropy"][0] == pytest.approx(math.log(8), abs=1e-4)


def test_measure_attention_of_a_model_with_random_weights_has_no_sinks(llava, questions):
    sinks = measure_attention(llava, questions, ProbeConfig(attention=True, sinks=True))["sinks"]
    assert not np.any(sinks["by_attention"])
    assert not np.any(sinks["mass"])
