"""The analyses of a cell against the same measurements of their parts."""

import dataclasses

import numpy as np
import pytest
import torch

from experiments.config.schema import ProbeConfig
from experiments.data.encoding import IGNORE_INDEX
from experiments.data.samples import single_questions
from experiments.evaluation import analyses, layerwise_ablation
from experiments.evaluation.accuracy import correct_answers, outcome_digits
from experiments.evaluation.questions import EncodedQuestions
from experiments.models.feature_cache import VisionFeatureCache
from probes import fusion_depth

CPU = torch.device("cpu")


@pytest.fixture
def samples(shapes_split):
    return list(single_questions(shapes_split.samples))[:12]


def test_run_probes_with_cached_features_does_not_run_the_vision_tower(
    deep_llava, processor, shapes_split, samples, tmp_path
):
    questions = EncodedQuestions(
        samples, processor, 4, CPU, VisionFeatureCache(tmp_path, deep_llava, processor, shapes_split)
    )
    with_pixels = EncodedQuestions(samples[:2], processor, 2, CPU)
    expected = outcome_digits(correct_answers(deep_llava, questions, "accuracy"))
    layers = list(deep_llava.model.vision_tower.encoder.layers)
    runs = []
    for layer in layers:
        layer.register_forward_hook(lambda *_: runs.append(1))
    parts = analyses.run_probes(
        deep_llava, questions, with_pixels, ProbeConfig(removal=True, knockout=True, readout=True)
    )
    assert not runs
    assert parts["removal"]["onward"][-1]["correct"] == expected
    assert parts["knockout"]["windows"][0]["correct"] == expected
    analyses.run_probes(deep_llava, questions, with_pixels, ProbeConfig(attention=True))
    assert len(runs) == len(layers)  # one batch of pixels


@pytest.mark.parametrize("name", ["attention", "removal", "lens"])
def test_check_questions_have_images_names_the_analysis_and_the_entry_of_text_alone(samples, name):
    alone = dataclasses.replace(samples[2], id="text-7", loaders=())
    analyses.check_questions_have_images([*samples, alone], ProbeConfig(controls=True))
    analyses.check_questions_have_images(samples, ProbeConfig(**{name: True}))
    with pytest.raises(ValueError, match=rf"^probe\.{name}: .* 13 .*'text-7'"):
        analyses.check_questions_have_images([*samples, alone], ProbeConfig(**{name: True}))


def test_run_probes_computes_logits_of_answers_alone(deep_llava, processor, samples):
    """A large vocabulary's head on every position costs as much as layers, and only answers are scored."""
    questions = EncodedQuestions(samples, processor, 4, CPU)
    answer = max(sum(label != IGNORE_INDEX for label in item["labels"]) for item in questions.encoded)
    logit_counts = []
    deep_llava.lm_head.register_forward_hook(lambda head, given, logits: logit_counts.append(logits.shape[1]))
    all_probes = ProbeConfig(attention=True, removal=True, knockout=True, readout=True)
    analyses.run_probes(deep_llava, questions, questions, all_probes)
    assert logit_counts
    assert max(logit_counts) == answer + 1  # one more for the position that predicts its first token


def test_measure_removal_by_kind_is_the_fusion_depth_of_removal_onward(deep_llava, processor, samples):
    samples = samples * 4  # six questions of most types
    part = layerwise_ablation.measure_removal(deep_llava, EncodedQuestions(samples, processor, 16, CPU), block=1)
    onward = np.array([list(run["correct"]) for run in part["onward"]], dtype=float)  # one digit a question
    question_types = np.array([sample.question_types[0] for sample in samples])
    assert part["by_kind"]
    assert sorted(part["by_kind"]) == sorted({name for name in question_types if (question_types == name).sum() >= 6})
    for name, depth in part["by_kind"].items():
        assert depth == dataclasses.asdict(fusion_depth(onward[:, question_types == name], "removal"))


def test_removal_depth_by_question_type_uses_the_questions_of_the_type_alone():
    rng = np.random.default_rng(0)
    easy = rng.random((5, 40)) < np.array([0.1, 0.5, 0.95, 0.95, 0.95])[:, None]
    hard = rng.random((5, 40)) < np.array([0.1, 0.1, 0.2, 0.5, 0.95])[:, None]
    both = np.stack([easy, hard], axis=2).reshape(5, 80)  # the types alternate
    question_types = ["easy", "hard"] * 40
    depths = layerwise_ablation.removal_depth_by_question_type(both.astype(float), question_types, block=2, depth=8)
    assert list(depths) == ["easy", "hard"]
    for name, values in (("easy", easy), ("hard", hard)):
        expected = dataclasses.asdict(fusion_depth(values.astype(float), "removal"))
        assert depths[name]["depth"] == 2 * expected["depth"]
        assert depths[name]["curve"] == expected["curve"]
        assert depths[name]["layers"] == 8
    assert depths["easy"]["high"] < depths["hard"]["low"]


def test_removal_depth_by_question_type_of_five_questions_is_left_out():
    onward = np.tile([0.0, 1.0] * 3 + [1.0] * 5, (3, 1))
    kinds = ["often"] * 6 + ["rare"] * 5
    assert list(layerwise_ablation.removal_depth_by_question_type(onward, kinds, block=1, depth=2)) == ["often"]
