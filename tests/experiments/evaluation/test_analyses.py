"""What is measured of a model against the same forward calls by hand."""

import dataclasses

import numpy as np
import pytest
import torch

from experiments.config.schema import ProbeConfig
from experiments.data.encoding import IGNORED
from experiments.data.samples import single_questions
from experiments.evaluation import analyses, layerwise_ablation
from experiments.evaluation.accuracy import correct, digits
from experiments.evaluation.questions import Questions
from experiments.models.feature_cache import Features
from probes import fusion_depth

CPU = torch.device("cpu")


@pytest.fixture
def samples(few):
    return list(single_questions(few.samples))[:12]


def test_probes_look_at_kept_features_and_leave_the_tower_alone(deep, processor, few, samples, tmp_path):
    questions = Questions(samples, processor, 4, CPU, Features(tmp_path, deep, processor, few))
    some = Questions(samples[:2], processor, 2, CPU)
    right = digits(correct(deep, questions, "picture"))
    layers = list(deep.model.vision_tower.encoder.layers)
    ran = []
    for layer in layers:
        layer.register_forward_hook(lambda *_: ran.append(1))
    found = analyses.analyse(deep, questions, some, ProbeConfig(removal=True, knockout=True, readout=True))
    assert not ran
    assert found["removal"]["onward"][-1]["correct"] == right
    assert found["knockout"]["windows"][0]["correct"] == right
    analyses.analyse(deep, questions, some, ProbeConfig(attention=True))
    assert len(ran) == len(layers)  # one batch of pixels


def test_no_analysis_makes_logits_that_nobody_reads(deep, processor, samples):
    """A large vocabulary's head on every position costs as much as layers do; only answers are scored by it."""
    questions = Questions(samples, processor, 4, CPU)
    answer = max(sum(label != IGNORED for label in item["labels"]) for item in questions.items)
    made = []
    deep.lm_head.register_forward_hook(lambda head, given, logits: made.append(logits.shape[1]))
    every = ProbeConfig(attention=True, removal=True, knockout=True, readout=True)
    analyses.analyse(deep, questions, questions, every)
    assert made
    assert max(made) == answer + 1  # and the position that predicts its first token


def test_depth_by_kind_is_of_removal_from_a_layer_onward(deep, processor, samples):
    part = layerwise_ablation.removal(deep, Questions(samples, processor, 4, CPU), block=1)
    onward = np.array([list(run["correct"]) for run in part["onward"]], dtype=float)  # one digit a question
    kinds = np.array([sample.kinds[0] for sample in samples])
    assert sorted(part["by_kind"]) == sorted({kind for kind in kinds if (kinds == kind).sum() > 1})
    for kind, found in part["by_kind"].items():
        assert found == dataclasses.asdict(fusion_depth(onward[:, kinds == kind], "removal"))


def test_depth_by_kind_is_that_of_these_questions_alone():
    rng = np.random.default_rng(0)
    easy = rng.random((5, 40)) < np.array([0.1, 0.5, 0.95, 0.95, 0.95])[:, None]
    hard = rng.random((5, 40)) < np.array([0.1, 0.1, 0.2, 0.5, 0.95])[:, None]
    both = np.stack([easy, hard], axis=2).reshape(5, 80)  # one kind after the other
    kinds = ["easy", "hard"] * 40
    found = layerwise_ablation.removal_by_kind(both.astype(float), kinds, block=2, layers=8)
    assert list(found) == ["easy", "hard"]
    for kind, values in (("easy", easy), ("hard", hard)):
        expected = dataclasses.asdict(fusion_depth(values.astype(float), "removal"))
        assert found[kind]["depth"] == 2 * expected["depth"]
        assert found[kind]["curve"] == expected["curve"]
        assert found[kind]["layers"] == 8
    assert found["easy"]["high"] < found["hard"]["low"]


def test_a_kind_asked_once_has_no_depth():
    onward = np.tile([0.0, 1.0] * 5 + [1.0], (3, 1))
    assert list(layerwise_ablation.removal_by_kind(onward, ["often"] * 10 + ["once"], block=1, layers=2)) == ["often"]
