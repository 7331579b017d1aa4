"""Accuracy without visual tokens in the first layers, and the fusion onset that it gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float
from transformers import PreTrainedModel

from experiments.evaluation.layerwise_ablation import estimate_by_question_type, layer_outcomes, measure_batches
from experiments.evaluation.questions import EncodedQuestions, ModelInputs
from probes import TokenMap
from probes.fusion.curves import ScoreFunction
from probes.fusion.onset import FusionOnset, fusion_onset, onset_curve


def measure_onset(model: PreTrainedModel, questions: EncodedQuestions, block: int) -> dict[str, Any]:
    """Measure the `onset` part of a record.

    Questions are answered without visual tokens in the first 0, 1, ... all blocks of layers: the image arrives late.

    Args:
        model: The model.
        questions: The questions.
        block: Layers of a block.
    """
    depth = model.config.get_text_config().num_hidden_layers
    ends = [*range(0, depth, block), depth]

    def measure(tokens: TokenMap, inputs: ModelInputs, score: ScoreFunction) -> np.ndarray:
        return onset_curve(model, tokens, inputs, score, ends)

    outcomes = measure_batches(questions, model, "late arrival of visual tokens", measure)
    return {
        "block": block,
        "upto": layer_outcomes([range(end) for end in ends], outcomes),
        "estimate": _onset(outcomes, block, depth),
        "by_kind": onset_by_question_type(outcomes, questions.question_types, block, depth),
    }


def onset_by_question_type(
    upto: Float[np.ndarray, "ends samples"], question_types: Sequence[str], block: int, depth: int
) -> dict[str, dict[str, Any]]:
    """Return the fusion onset of each question type.

    Args:
        upto: Outcomes without visual tokens in the first 0, 1, ... all blocks.
        question_types: Type of each question. Types with fewer than `FEWEST_QUESTIONS` are left out.
        block: Layers of a block.
        depth: Layers of the language model.
    """
    return estimate_by_question_type(upto, question_types, partial(_onset, block=block, depth=depth))


def blocks_to_layers(onset: FusionOnset, block: int, depth: int) -> FusionOnset:
    """Convert an onset from blocks to layers: the first layer of its block.

    The image was shown to arrive in time for this layer. Whether it may arrive later inside the block was not measured.

    Args:
        onset: The onset in blocks, counted from 1.
        block: Layers of a block.
        depth: Layers of the language model.

    Example:
        >>> blocks_to_layers(FusionOnset(3, 2, 3, 0.1, 4, 40), block=4, depth=14).onset
        9
    """

    def to_layer(number: int | None) -> int | None:
        return None if number is None else (number - 1) * block + 1

    return replace(
        onset,
        onset=to_layer(onset.onset),
        low=to_layer(onset.low),
        high=to_layer(onset.high),
        reads=tuple((number - 1) * block + 1 for number in onset.reads),
        layers=depth,
    )


def _onset(upto: np.ndarray, block: int, depth: int) -> dict[str, Any]:
    return asdict(blocks_to_layers(fusion_onset(upto), block, depth))
