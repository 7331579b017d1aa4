"""The onset part of a record against whole calls of the model with visual tokens masked."""

import dataclasses

import numpy as np
import pytest
import torch

from experiments.data.encoding import IGNORE_INDEX
from experiments.data.samples import single_questions
from experiments.evaluation.accuracy import outcome_digits
from experiments.evaluation.onset import blocks_to_layers, measure_onset, onset_by_question_type
from experiments.evaluation.questions import EncodedQuestions
from probes import RemoveTokens, TokenMap, intervene
from probes.fusion.onset import FusionOnset, fusion_onset

CPU = torch.device("cpu")


@pytest.fixture
def questions(shapes_split, processor, deep_llava):
    """Questions whose right answers are what the intact model writes, so that a lost answer shows."""
    encoded = EncodedQuestions(list(single_questions(shapes_split.samples))[:12], processor, 1, CPU)
    for item, inputs in zip(encoded.encoded, encoded.batches("intact"), strict=True):
        inputs.pop("labels")
        with torch.no_grad():
            predicted = deep_llava(**inputs).logits[0].argmax(-1)
        for position in range(1, len(item["labels"])):
            if item["labels"][position] != IGNORE_INDEX:
                item["labels"][position] = predicted[position - 1]
    return encoded


def masked_outcomes(model, questions, layers):
    """Return outcomes with visual tokens masked in some layers, from calls of the model with all their logits."""
    outcomes = []
    for inputs in questions.batches("masked"):
        labels = inputs.pop("labels")
        tokens = TokenMap.from_inputs(model, inputs)
        with torch.no_grad(), intervene(model, tokens, RemoveTokens("vision", layers, how="mask")):
            predicted = model(**inputs).logits[:, :-1].argmax(-1)
        answer = labels[:, 1:]
        outcomes.append(((predicted == answer) | (answer == IGNORE_INDEX)).all(1))
    return outcome_digits(torch.cat(outcomes))


def test_measure_onset_equals_masking_the_first_blocks_of_layers(deep_llava, questions):
    part = measure_onset(deep_llava, questions, block=3)
    assert [run["layers"] for run in part["upto"]] == [[], [0, 1, 2], [0, 1, 2, 3]]
    assert part["upto"][0]["correct"] == "1" * 12
    for run in part["upto"][1:]:
        assert run["correct"] == masked_outcomes(deep_llava, questions, run["layers"])
    assert "0" in part["upto"][-1]["correct"], "the image changes some answers of this model"
    assert part["estimate"]["layers"] == 4


def step(first_lost: int, questions: int = 40) -> np.ndarray:
    """Return outcomes of four blocks in which hiding the image up to a block loses all answers."""
    return np.repeat((np.arange(5) < first_lost)[:, None], questions, axis=1).astype(float)


def test_onset_by_question_type_uses_the_questions_of_the_type_alone():
    upto = np.stack([step(1), step(3)], axis=2).reshape(5, 80)  # the types alternate
    onsets = onset_by_question_type(upto, ["early", "late"] * 40, block=2, depth=8)
    assert {name: onset["onset"] for name, onset in onsets.items()} == {"early": 1, "late": 5}
    assert dataclasses.asdict(fusion_onset(step(3)))["curve"] == onsets["late"]["curve"]
    kinds = ["often"] * 6 + ["rare"] * 5
    assert list(onset_by_question_type(upto[:, :11], kinds, block=2, depth=8)) == ["often"]


@pytest.mark.parametrize(("onset", "expected"), [(None, None), (1, 1), (2, 5), (4, 13)])
def test_blocks_to_layers_is_the_first_layer_of_the_block(onset, expected):
    found = blocks_to_layers(FusionOnset(onset, onset, onset, 0.1, 4, 40, reads=(2, 3)), block=4, depth=14)
    assert (found.onset, found.low, found.high) == (expected,) * 3
    assert (found.reads, found.layers) == ((5, 9), 14)
