"""TODO"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float
from transformers import PreTrainedModel

from experiments.data.encoding import on_answers
from experiments.devices import inference
from experiments.evaluation.accuracy import digits, greedy_matches
from experiments.evaluation.questions import Inputs, Questions, token_map
from probes import FusionDepth, TokenMap, fusion_depth
from probes.fusion.curves import Score, knockout_curve, removal_scores


def _measured(
    questions: Questions, model: PreTrainedModel, say: str, measure: Callable[[TokenMap, Inputs, Score], Any]
) -> np.ndarray:
    """`measure` of every batch, `[points, samples]` each, side by side. It is given what asks for the answers alone, and
    what scores them."""
    parts = []
    with inference(model):
        for inputs in questions.batches(say):
            asked, labels = on_answers(inputs)
            parts.append(measure(token_map(model, inputs), asked, partial(greedy_matches, labels=labels)))
    return np.concatenate(parts, axis=1)


def _runs(layers: Sequence[range], outcomes: np.ndarray) -> list[dict[str, Any]]:
    """What was done to which layers, with one digit a question."""
    return [{"layers": list(some), "correct": digits(row)} for some, row in zip(layers, outcomes, strict=True)]


def removal(model: PreTrainedModel, questions: Questions, block: int) -> dict[str, Any]:
    """The `removal` part of a record: answers without visual tokens inside each block of layers, and from it onward.

    The paper's Figure 5 drops "all vision tokens in layers a to b" and leaves open which of the two is meant.
    """
    layers = model.config.get_text_config().num_hidden_layers
    blocks = [range(a, min(a + block, layers)) for a in range(0, layers, block)]
    onwards = [range(a, layers) for a in [*(some.start for some in blocks), layers]]

    def measure(tokens: TokenMap, asked: Inputs, score: Score) -> np.ndarray:
        return removal_scores(model, tokens, asked, score, [*blocks, *onwards])

    outcomes = _measured(questions, model, "no vision in some layers", measure)
    inside, onward = np.split(outcomes, [len(blocks)])
    return {
        "block": block,
        "inside": _runs(blocks, inside),
        "onward": _runs(onwards, onward),
        "by_kind": removal_by_kind(onward, [sample.kinds[0] for sample in questions.samples], block, layers),
        "fusion": _removal_depth(onward, block, layers),
    }


def removal_by_kind(
    onward: Float[np.ndarray, "starts samples"], kinds: Sequence[str], block: int, layers: int
) -> dict[str, dict[str, Any]]:
    """The fusion depth of each kind of question, from what is right without visual tokens from each block onward."""
    of = np.array(kinds)
    return {
        kind: _removal_depth(onward[:, of == kind], block, layers)
        for kind in sorted(set(kinds))
        if (of == kind).sum() > 1  # no interval rests on one
    }


def _removal_depth(onward: Float[np.ndarray, "starts samples"], block: int, layers: int) -> dict[str, Any]:
    return asdict(_in_layers(fusion_depth(onward, "removal"), block, layers))


def knockout(model: PreTrainedModel, questions: Questions, width: int) -> dict[str, Any]:
    """The `knockout` part of a record: answers of the intact model, and with all text cut off from the visual tokens in
    windows of `width` layers, which go on being processed."""
    layers = model.config.get_text_config().num_hidden_layers

    def measure(tokens: TokenMap, asked: Inputs, score: Score) -> np.ndarray:
        return knockout_curve(model, tokens, asked, score, width)

    outcomes = _measured(questions, model, "text cut off from vision", measure)
    windows = [range(max(end - width, 0), min(end, layers)) for end in range(1, layers + width)]
    return {
        "width": width,
        "windows": _runs([range(0), *windows], outcomes),
        "fusion": asdict(fusion_depth(outcomes, "knockout", width=width)),
    }


def _in_layers(depth: FusionDepth, block: int, layers: int) -> FusionDepth:
    """A depth counted in blocks, counted in layers, to the end of the block; the last one may be shorter."""

    def count(blocks: int) -> int:
        return min(blocks * block, layers)

    return replace(
        depth,
        depth=depth.depth and count(depth.depth),
        low=depth.low and count(depth.low),
        high=depth.high and count(depth.high),
        reads=tuple(map(count, depth.reads)),
        layers=layers,
    )
