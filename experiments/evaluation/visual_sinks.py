"""Visual attention sinks of the test questions, by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from experiments.data.encoding import restrict_to_answers
from experiments.devices import inference_mode
from experiments.evaluation.questions import EncodedQuestions
from probes import TokenMap, record_attention
from probes.attention.sinks import SINK_STATISTICS, Sinks, find_sinks

_DIGITS = 5  # decimal places that records store


@dataclass(frozen=True, eq=False)
class BatchSinks:
    """The visual sinks of a batch.

    Attributes:
        sinks: The sinks of each layer and question.
        mass: Attention from each target to the sinks by attention of the layer, as a mean over heads.
    """

    sinks: Sinks
    mass: Float[Tensor, "targets layers batch"]


def find_question_sinks(
    model: PreTrainedModel, questions: EncodedQuestions, maps: Sequence[TokenMap], targets: Sequence[str]
) -> list[BatchSinks]:
    """Find the visual sinks of each batch, with one forward pass a batch.

    Args:
        model: The model.
        questions: The questions, with pixels.
        maps: Token map of each batch of questions.
        targets: Groups whose queries count alike.
    """
    found = []
    with inference_mode(model):
        for tokens, inputs in zip(maps, questions.batches("visual sinks"), strict=True):
            statistics = ("received", *SINK_STATISTICS)
            with record_attention(model, tokens, targets=targets, statistics=statistics) as record:
                model(**restrict_to_answers(inputs)[0])
            sinks = find_sinks(record, tokens, targets)
            received = record.received.mean(2)  # layers, batch, targets, positions
            mass = torch.where(sinks.by_attention[:, :, None], received, 0).nansum(-1)
            found.append(BatchSinks(sinks, mass.permute(2, 0, 1)))
    return found


def sinks_part(found: Sequence[BatchSinks], maps: Sequence[TokenMap], targets: Sequence[str]) -> dict[str, Any]:
    """Return the `sinks` part of a record, without `left_out`.

    Args:
        found: The sinks of each batch.
        maps: Token map of each batch.
        targets: Groups whose queries were counted.
    """
    by_attention = torch.cat([batch.sinks.by_attention.sum(-1) for batch in found], 1)
    by_value = torch.cat([batch.sinks.by_value.sum(-1) for batch in found], 1)
    mass = torch.cat([batch.mass for batch in found], 2).double()
    return {
        "targets": list(targets),
        "source": "vision",
        "samples": by_attention.shape[1],
        "by_attention": by_attention.tolist(),
        "by_value": by_value.tolist(),
        "mass": mass.mul(10**_DIGITS).round().div(10**_DIGITS).tolist(),
        "tokens": _share_by_token(found, maps),
    }


def _share_by_token(found: Sequence[BatchSinks], maps: Sequence[TokenMap]) -> list[list[float]] | None:
    """Return in which share of the questions each visual token is a sink, [layers, tokens].

    None if questions differ in their number of visual tokens, or have none.
    """
    visions = [tokens.mask("vision").cpu() for tokens in maps]
    counts = {int(count) for vision in visions for count in vision.sum(1)}
    if len(counts) > 1 or counts == {0}:
        return None
    in_order = [_visual_tokens(batch.sinks.by_attention, vision) for batch, vision in zip(found, visions, strict=True)]
    share = torch.cat(in_order, 1).double().mean(1)
    return [[round(value, _DIGITS) for value in row] for row in share.tolist()]


def _visual_tokens(
    sinks: Bool[Tensor, "layers batch positions"], vision: Bool[Tensor, "batch positions"]
) -> Bool[Tensor, "layers batch tokens"]:
    """Return the visual tokens of each question in their order; every question has as many."""
    return sinks[:, :, : vision.shape[1]][:, vision].view(len(sinks), len(vision), -1)
