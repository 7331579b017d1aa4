"""Tests of the paper's claims on real models: those with planted reading layers, and those with random weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from experiments.records.files import Records
from experiments.report.claims.answers import DOES_NOT_HOLD, HOLDS, UNDECIDED
from experiments.report.claims.registry import judge_claims
from experiments.report.run_groups import group_runs
from probes import TokenMap, record_attention
from probes.fusion.curves import knockout_curve, removal_scores
from probes.fusion.planted_models import PlantedSamples, planted

LAYERS, QUESTIONS = 6, 120
KEYS = ("attention_early", "entropy_early", "first_block", "image_may_leave", "text_reads_early")


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
    knockout = knockout_curve(model, tokens, inputs, right)
    with torch.no_grad(), record_attention(model, tokens, targets=("instruction",)) as attention:
        model(**inputs)
    vision = attention.sources.index("vision")
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
        "accuracy": {"image": runs([range(0)], knockout[:1])[0]["correct"]},
        "attention": {
            "pairs": [["instruction", "vision"]],
            "samples": QUESTIONS,
            **{k: [v] for k, v in curves.items()},
        },
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
        (1, (YES, NO, YES, YES, YES)),
        (2, (YES, NO, NO, YES, YES)),
        (3, (OPEN, NO, NO, YES, YES)),
        (4, (OPEN, NO, NO, NO, NO)),
        (5, (NO, NO, NO, NO, NO)),
        (6, (NO, NO, NO, NO, NO)),
        # Each of two layers reads half of the answer, so neither costs more, and the later one decides.
        ((1, 3), (YES, NO, OPEN, YES, YES)),
        ((1, 6), (NO, NO, OPEN, NO, NO)),
        (None, (OPEN, NO, OPEN, OPEN, OPEN)),
    ],
)
def test_claims_on_planted_models_are_right(layer: int | tuple[int, int] | None, expected: tuple[str, ...]) -> None:
    reference = planted(layer=layer, layers=LAYERS)
    assert answers_of(measure(reference.model, reference.samples(QUESTIONS))) == expected


def random_answers(seed: int, deviation: float) -> tuple[str, ...]:
    """Return the answers of a model with normal random weights on questions whose right answers are random too."""
    torch.manual_seed(seed)
    config = planted(layer=None, layers=LAYERS).model.config
    config.text_config.initializer_range = deviation
    model = LlavaForConditionalGeneration(config).eval()
    samples = planted(layer=1, layers=LAYERS).samples(QUESTIONS, seed)
    return answers_of(measure(model, samples))


@pytest.mark.slow
@pytest.mark.parametrize("deviation", [0.02, 0.2])
def test_claims_on_random_models_hold_in_at_most_5_percent(deviation: float) -> None:
    answers = [random_answers(seed, deviation) for seed in range(200)]
    rates = {key: sum(answer[number] == HOLDS for answer in answers) / 200 for number, key in enumerate(KEYS)}
    assert max(rates.values()) <= 0.05, rates
