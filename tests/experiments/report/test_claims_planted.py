"""Tests of the paper's claims on real models: those with planted reading layers, and those with random weights.

Run as a script, it prints the table of planted models and the rates of random models for docs/claims.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from experiments.evaluation.attention_by_layer import share_of_norms
from experiments.records.files import Records
from experiments.report.claims.answers import DOES_NOT_HOLD, HOLDS, UNDECIDED
from experiments.report.claims.registry import judge_claims
from experiments.report.run_groups import group_runs
from probes import TokenMap, record_attention
from probes.fusion.curves import knockout_curve, removal_scores
from probes.fusion.onset import onset_curve
from probes.fusion.planted_models import ANSWER_IDS, PlantedSamples, planted

LAYERS, QUESTIONS = 6, 120
KEYS = (
    *("attention_early", "contribution_early", "entropy_early"),
    *("first_block", "image_may_leave", "image_needed_early", "text_reads_early"),
)
NEED_IMAGE = KEYS[3:]
"""The claims that cannot be told where the answers do not need the image."""
DRAWS = 200


@torch.no_grad()
def measure(model: LlavaForConditionalGeneration, samples: PlantedSamples) -> dict[str, Any]:
    """Measure a record with the probes that run on any other model."""
    inputs, answers = samples.inputs, samples.answers
    tokens = TokenMap.from_inputs(model, inputs)

    def right(logits: torch.Tensor) -> torch.Tensor:
        return (logits[:, -1].argmax(-1) == answers).float()

    def runs(spans: list[range], outcomes: np.ndarray) -> list[dict[str, Any]]:
        texts = ["".join("1" if value else "0" for value in row) for row in outcomes]
        return [{"layers": list(span), "correct": text} for span, text in zip(spans, texts, strict=True)]

    single = [range(layer, layer + 1) for layer in range(LAYERS)]
    onward = [range(first, LAYERS) for first in range(LAYERS + 1)]
    removal = removal_scores(model, tokens, inputs, right, [*single, *onward])
    onset = onset_curve(model, tokens, inputs, right)
    # Neighbours differ in colour.
    shuffled = right(model(**{**inputs, "pixel_values": inputs["pixel_values"].roll(1, dims=0)}).logits)
    knockout = knockout_curve(model, tokens, inputs, right)
    statistics = ("entropy", "contribution")
    with record_attention(model, tokens, targets=("instruction",), statistics=statistics) as attention:
        model(**inputs)
    vision = attention.sources.index("vision")
    share = share_of_norms(attention.contribution)[:, :, 0, vision].tolist()
    curves = {name: getattr(attention, name).mean(2)[:, :, 0, vision].tolist() for name in ("mass", "entropy")}
    part = {"label": "LLaVA", "layers": LAYERS, "visual_tokens": 4, "prefusion_layers": 0, "compressor": "none"}
    data = {"fingerprint": "planted", "examples": QUESTIONS, "kinds": ["colour"] * QUESTIONS}
    return {
        "id": "0" * 16,
        "experiment": "attention",
        "name": "planted",
        "status": "finished",
        "config": {"seed": 0},
        "model": part,
        "data": data,
        "accuracy": {
            "image": runs([range(0)], knockout[:1])[0]["correct"],
            "shuffled": runs([range(0)], shuffled.numpy()[None])[0]["correct"],
        },
        "attention": {
            "pairs": [["instruction", "vision"]],
            "samples": QUESTIONS,
            **{k: [v] for k, v in curves.items()},
        },
        "contribution": {"pairs": [["instruction", "vision"]], "samples": QUESTIONS, "share": [share]},
        "onset": {"upto": runs([range(end) for end in range(LAYERS + 1)], onset)},
        "removal": {"inside": runs(single, removal[:LAYERS]), "onward": runs(onward, removal[LAYERS:])},
        "knockout": {"width": 1, "windows": runs([range(0), *single], knockout)},
    }


def answers_of(record: dict[str, Any]) -> tuple[str, ...]:
    findings = judge_claims(group_runs(Records((record,), (), (), ())))
    found = {finding.claim.key: finding.estimate.answer for finding in findings}
    return tuple(found[key] for key in KEYS)


YES, NO, OPEN = HOLDS, DOES_NOT_HOLD, UNDECIDED


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        # Text attends to the image in its reading layers alone. Its attention within the image is even in every layer.
        (1, (YES, YES, NO, YES, YES, YES, YES)),
        (2, (YES, YES, NO, NO, YES, YES, YES)),
        (3, (OPEN, OPEN, NO, NO, YES, YES, YES)),
        (4, (OPEN, OPEN, NO, NO, NO, NO, NO)),
        (5, (NO, NO, NO, NO, NO, NO, NO)),
        (6, (NO, NO, NO, NO, NO, NO, NO)),
        # Each of two layers reads half of the answer, so neither costs more, and both are needed.
        ((1, 3), (YES, YES, NO, OPEN, YES, YES, YES)),
        ((1, 6), (NO, NO, NO, OPEN, NO, NO, NO)),
        (None, (OPEN, OPEN, NO, OPEN, OPEN, OPEN, OPEN)),
    ],
)
def test_claims_on_planted_models_are_right(layer: int | tuple[int, int] | None, expected: tuple[str, ...]) -> None:
    reference = planted(layer=layer, layers=LAYERS)
    assert answers_of(measure(reference.model, reference.samples(QUESTIONS))) == expected


def random_answers(seed: int, deviation: float, of_image: bool) -> tuple[str, ...]:
    """Return the answers of a model with normal random weights.

    Args:
        seed: Seed of weights and questions.
        deviation: Standard deviation of the weights.
        of_image: Whether right answers are the colours of the images, of which there are four. Otherwise each question's
            right answer is a random colour, so that no model can need the image.
    """
    torch.manual_seed(seed)
    config = planted(layer=None, layers=LAYERS).model.config
    config.text_config.initializer_range = deviation
    model = LlavaForConditionalGeneration(config).eval()
    samples = planted(layer=1, layers=LAYERS).samples(QUESTIONS, seed)
    if not of_image:
        samples = replace(samples, answers=torch.tensor(ANSWER_IDS)[torch.randint(len(ANSWER_IDS), (QUESTIONS,))])
    return answers_of(measure(model, samples))


def rates(answers: Sequence[tuple[str, ...]]) -> dict[str, tuple[float, float]]:
    """Return the shares of draws in which each claim holds and does not hold."""
    counted = [(list(column).count(YES), list(column).count(NO)) for column in zip(*answers, strict=True)]
    return {key: (yes / len(answers), no / len(answers)) for key, (yes, no) in zip(KEYS, counted, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("deviation", [0.02, 0.2])
def test_claims_on_random_models_are_false_in_at_most_5_percent(deviation: float) -> None:
    """No claim is true of a model with random weights, and those on interventions are not false either."""
    found = rates([random_answers(seed, deviation, of_image=False) for seed in range(DRAWS)])
    assert max(yes for yes, _ in found.values()) <= 0.05, found
    assert max(found[key][1] for key in NEED_IMAGE) <= 0.05, found


if __name__ == "__main__":
    for layer in (*range(1, LAYERS + 1), (1, 3), (1, 6), None):
        reference = planted(layer=layer, layers=LAYERS)
        print(layer, *answers_of(measure(reference.model, reference.samples(QUESTIONS))), sep=" | ")
    for deviation in (0.02, 0.2):
        for of_image in (False, True):
            print(deviation, of_image, rates([random_answers(seed, deviation, of_image) for seed in range(DRAWS)]))
