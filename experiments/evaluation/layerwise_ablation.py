"""Accuracy without visual tokens in some layers (removal), and with attention to them blocked (knock-out)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float
from transformers import PreTrainedModel

from experiments.data.encoding import restrict_to_answers
from experiments.data.question_types import FEWEST_QUESTIONS
from experiments.devices import inference_mode
from experiments.evaluation.accuracy import greedy_matches, outcome_digits
from experiments.evaluation.questions import EncodedQuestions, ModelInputs, instruction_token_map
from probes import FusionDepth, TokenMap, fusion_depth
from probes.fusion.curves import ScoreFunction, knockout_curve, removal_scores


def measure_removal(model: PreTrainedModel, questions: EncodedQuestions, block: int) -> dict[str, Any]:
    """Measure the `removal` part of a record.

    Questions are answered without visual tokens inside each block of layers, and from each block onward. The paper's
    Figure 5 drops "all vision tokens in layers a to b" and leaves open which of the two is meant.

    Args:
        model: The model.
        questions: The questions.
        block: Layers of a block.
    """
    depth = model.config.get_text_config().num_hidden_layers
    blocks = [range(first, min(first + block, depth)) for first in range(0, depth, block)]
    onwards = [range(first, depth) for first in [*(layers.start for layers in blocks), depth]]

    def measure(tokens: TokenMap, inputs: ModelInputs, score: ScoreFunction) -> np.ndarray:
        return removal_scores(model, tokens, inputs, score, [*blocks, *onwards])

    outcomes = measure_batches(questions, model, "removal of visual tokens", measure)
    inside, onward = np.split(outcomes, [len(blocks)])
    return {
        "block": block,
        "inside": layer_outcomes(blocks, inside),
        "onward": layer_outcomes(onwards, onward),
        "by_kind": removal_depth_by_question_type(onward, questions.question_types, block, depth),
        "fusion": _removal_depth(onward, block, depth),
    }


def measure_knockout(model: PreTrainedModel, questions: EncodedQuestions, width: int) -> dict[str, Any]:
    """Measure the `knockout` part of a record.

    Questions are answered by the intact model, and with attention from all text to visual tokens blocked in windows of
    layers. The visual tokens themselves are still processed there.

    Args:
        model: The model.
        questions: The questions.
        width: Layers of a window.
    """
    depth = model.config.get_text_config().num_hidden_layers

    def measure(tokens: TokenMap, inputs: ModelInputs, score: ScoreFunction) -> np.ndarray:
        return knockout_curve(model, tokens, inputs, score, width)

    outcomes = measure_batches(questions, model, "attention knock-out", measure)
    windows = [range(max(end - width, 0), min(end, depth)) for end in range(1, depth + width)]
    return {
        "width": width,
        "windows": layer_outcomes([range(0), *windows], outcomes),
        "fusion": asdict(fusion_depth(outcomes, "knockout", width=width)),
    }


def removal_depth_by_question_type(
    onward: Float[np.ndarray, "starts samples"], question_types: Sequence[str], block: int, depth: int
) -> dict[str, dict[str, Any]]:
    """Return the fusion depth of each question type.

    Args:
        onward: Outcomes without visual tokens from each block onward.
        question_types: Type of each question. Types with fewer than `FEWEST_QUESTIONS` are left out.
        block: Layers of a block.
        depth: Layers of the language model.
    """
    return estimate_by_question_type(onward, question_types, partial(_removal_depth, block=block, depth=depth))


def estimate_by_question_type(
    outcomes: Float[np.ndarray, "points samples"],
    question_types: Sequence[str],
    estimate: Callable[[Float[np.ndarray, "points samples_of_type"]], dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    """Return an estimate from the outcomes of each question type.

    Args:
        outcomes: Outcomes at each point of a curve.
        question_types: Type of each question. Types with fewer than `FEWEST_QUESTIONS` are left out.
        estimate: Makes the estimate from the outcomes of one type.
    """
    type_of_question = np.array(question_types)
    return {
        question_type: estimate(outcomes[:, type_of_question == question_type])
        for question_type in sorted(set(question_types))
        if (type_of_question == question_type).sum() >= FEWEST_QUESTIONS
    }


def measure_batches(
    questions: EncodedQuestions,
    model: PreTrainedModel,
    progress_label: str,
    measure: Callable[[TokenMap, ModelInputs, ScoreFunction], Float[np.ndarray, "points batch"]],
) -> Float[np.ndarray, "points samples"]:
    """Measure every batch, and concatenate the results.

    Args:
        questions: The questions.
        model: The model.
        progress_label: Label of the progress bar.
        measure: Gets the token map, inputs whose logits are restricted to answers, and what scores these logits.
    """
    batches = []
    with inference_mode(model):
        for inputs in questions.batches(progress_label):
            model_inputs, labels = restrict_to_answers(inputs)
            score = partial(greedy_matches, labels=labels)
            batches.append(measure(instruction_token_map(model, inputs), model_inputs, score))
    return np.concatenate(batches, axis=1)


def layer_outcomes(layers: Sequence[range], outcomes: np.ndarray) -> list[dict[str, Any]]:
    """Return the ablated layers with one digit per question."""
    return [
        {"layers": list(ablated), "correct": outcome_digits(row)} for ablated, row in zip(layers, outcomes, strict=True)
    ]


def _removal_depth(onward: Float[np.ndarray, "starts samples"], block: int, depth: int) -> dict[str, Any]:
    return asdict(_blocks_to_layers(fusion_depth(onward, "removal"), block, depth))


def _blocks_to_layers(fusion: FusionDepth, block: int, depth: int) -> FusionDepth:
    """Convert a fusion depth from blocks to layers, up to the end of the block; the last block may be shorter."""

    def to_layers(blocks: int) -> int:
        return min(blocks * block, depth)

    return replace(
        fusion,
        depth=fusion.depth and to_layers(fusion.depth),
        low=fusion.low and to_layers(fusion.low),
        high=fusion.high and to_layers(fusion.high),
        reads=tuple(map(to_layers, fusion.reads)),
        layers=depth,
    )
