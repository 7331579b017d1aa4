"""The paper's three analyses on test questions (attention mass, attention entropy, removal of visual tokens), and two
that check them: attention knock-out, and what a linear read-out finds in the text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from experiments.config import ProbeConfig
from experiments.data.conversation import on_answers
from experiments.evaluation import Inputs, Questions, digits, greedy_matches
from experiments.lens import lens
from experiments.models import inference
from experiments.token_groups import token_map
from probes import FusionDepth, TokenMap, fusion_depth, record_attention
from probes.fusion.curves import Score, knockout_curve, removal_scores, text_states
from probes.readouts.linear_probe import linear_readout

PAIRS = (("instruction", "vision"), ("instruction", "instruction"), ("response", "vision"), ("response", "instruction"))
FUSION_PAIR = PAIRS.index(("instruction", "vision"))
READOUT_FOLDS = 5
_DIGITS = 5  # kept of each number per sample


def _pairs(
    values: Float[Tensor, "layers batch targets sources"], groups: tuple[str, ...], targets: tuple[str, ...]
) -> Tensor:
    return torch.stack([values[:, :, targets.index(t), groups.index(s)] for t, s in PAIRS])


def attention_by_layer(
    model: PreTrainedModel, questions: Questions, say: str
) -> dict[str, Float[np.ndarray, "pairs layers samples"]]:
    """Mass and entropy (nats) between the token groups of PAIRS, mean over heads, for each question."""
    parts: dict[str, list[Tensor]] = {"mass": [], "entropy": []}
    with inference(model):
        for inputs in questions.batches(say):
            with record_attention(model, token_map(model, inputs), targets=("instruction", "response")) as record:
                model(**on_answers(inputs)[0])
            for name, part in parts.items():
                part.append(_pairs(getattr(record, name).mean(2), record.sources, record.targets))
    return {name: torch.cat(part, -1).numpy() for name, part in parts.items()}


def uniform_attention(model: PreTrainedModel, questions: Questions) -> dict[str, list[float]]:
    """What attention spread evenly over all visible positions would give: the mass of each pair, and the entropy.

    The entropy, ln of the number of visible source tokens, is the most that any attention can reach.
    """
    mass, entropy = [], []
    for inputs in questions.batches("uniform attention"):
        tokens = token_map(model, inputs)
        seen = {group: tokens.mask(group).cumsum(1).float() for group in ("instruction", "response", "vision")}
        everything = sum(seen.values())
        for_pair = []
        for target, source in PAIRS:
            queries = tokens.mask(target) & (seen[source] > 0)
            count = queries.sum(1)
            share = torch.where(queries, seen[source] / everything, 0).sum(1) / count
            most = torch.where(queries, seen[source].clamp(min=1).log(), 0).sum(1) / count
            for_pair.append(torch.stack([share, most]))
        mass_and_entropy = torch.stack(for_pair, 1)  # [2, pairs, batch]
        mass.append(mass_and_entropy[0])
        entropy.append(mass_and_entropy[1])
    return {
        "uniform_mass": torch.cat(mass, 1).nanmean(1).tolist(),
        "uniform_entropy": torch.cat(entropy, 1).nanmean(1).tolist(),
    }


def attention(model: PreTrainedModel, questions: Questions, control: bool) -> dict[str, Any]:
    """The `attention` part of a record; `control` adds the same model with random weights."""
    found = attention_by_layer(model, questions, "attention")
    part: dict[str, Any] = {
        "pairs": PAIRS,
        "samples": len(questions),
        "queries_note": "a response query is an answer token that is read, not the position that predicts it",
        **{name: _nullable(values) for name, values in found.items()},
        **uniform_attention(model, questions),
        "control": None,
    }
    if control:
        random = type(model)._from_config(model.config, dtype=model.dtype).to(model.device)
        means = {k: np.nanmean(v, -1) for k, v in attention_by_layer(random, questions, "random weights").items()}
        part["control"] = {"name": "same model, random weights", **{k: _nullable(v) for k, v in means.items()}}
    part["fusion"] = asdict(fusion_depth(found["mass"][FUSION_PAIR], "attention"))
    return part


def _nullable(values: np.ndarray) -> list[Any]:
    """Nested lists rounded for storage, None where undefined: JSON has no NaN."""
    rounded = np.round(values.astype(np.float64), _DIGITS)
    return np.where(np.isnan(rounded), None, rounded).tolist()  # type: ignore[call-overload]


def check(model: PreTrainedModel, config: ProbeConfig) -> None:
    """Before anything is measured: can it be?

    Raises:
        ValueError: if the layers to take visual tokens from at once are more than the model has, or none.
    """
    layers = model.config.get_text_config().num_hidden_layers
    for field, count in (("block", config.block), ("knockout_width", config.knockout_width)):
        if not 1 <= count <= layers:
            raise ValueError(f"probe.{field}: {count} layers at once in a model of {layers}; use 1 to {layers}")


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


def readout(model: PreTrainedModel, questions: Questions) -> dict[str, Any] | None:
    """The `readout` part of a record: whether a linear classifier reads the right answer off the question's own states
    after 0, 1, ... all layers, on pictures that it was not trained on. None where the answers are too few or alike."""
    with inference(model):
        parts = [
            text_states(model, token_map(model, inputs), on_answers(inputs)[0])
            for inputs in questions.batches("states of the text")
        ]
    states = torch.cat(parts, dim=1)
    seeing = [i for i, sample in enumerate(questions.samples) if sample.load]
    answers = [questions.samples[i].answers[0] for i in seeing]
    pictures = [questions.samples[i].load for i in seeing]
    if len(set(answers)) < 2 or len(set(pictures)) < READOUT_FOLDS:
        return None
    found = linear_readout(states[:, seeing], answers, pictures=pictures, folds=READOUT_FOLDS)
    return {
        "label": "the right answer",
        "samples": len(seeing),
        "depths": [
            {"correct": digits(right), "control": digits(control)}
            for right, control in zip(found.correct, found.control, strict=True)
        ],
        "fusion": asdict(fusion_depth(found.correct, "readout")),
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


def analyse(model: PreTrainedModel, questions: Questions, some: Questions, config: ProbeConfig) -> dict[str, Any]:
    """All that `config` asks for; attention is recorded on `some` questions, with pixels for the tower of random weights
    to look at; the rest is measured on all."""
    found: dict[str, dict[str, Any] | None] = dict.fromkeys(("attention", "removal", "knockout", "readout"))
    if config.attention:
        found["attention"] = attention(model, some, config.random_control)
    with questions.given():
        if config.removal:
            found["removal"] = removal(model, questions, config.block)
        if config.knockout:
            found["knockout"] = knockout(model, questions, config.knockout_width)
        if config.readout:
            found["readout"] = readout(model, questions)
        read = _lens(model, questions, config)
    depths = {name: part.pop("fusion") for name, part in found.items() if part}
    return {**found, "fusion": depths or None, **read}


def _lens(model: PreTrainedModel, questions: Questions, config: ProbeConfig) -> dict[str, Any]:
    """The `lens` part, and in `lens_note` why it is None where it was asked for: not every model can be read so."""
    try:
        return {"lens": lens(model, questions) if config.lens else None, "lens_note": None}
    except ValueError as error:
        return {"lens": None, "lens_note": str(error)}
