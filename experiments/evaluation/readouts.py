"""The right answer's first word in the language model, layer by layer: a logit lens where the answer begins."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from experiments.data.encoding import IGNORED, on_answers
from experiments.devices import inference
from experiments.evaluation.accuracy import digits
from experiments.evaluation.questions import Questions, token_map
from probes import fusion_depth
from probes.fusion.curves import text_states
from probes.readouts.linear_probe import linear_readout
from probes.readouts.logit_lens import logit_lens

_DIGITS = 5  # kept of a mean log-probability


def lens(model: PreTrainedModel, questions: Questions) -> dict[str, Any]:
    """The `lens` part of a record: after 0, 1, ... all layers, whether the right answer's first token ranks first of the
    vocabulary, one digit a question, and its mean log-probability in nats.

    It is read where the model predicts that token, the last position of the question's prompt, by the model's own final
    norm and head: after all layers it is the model's own prediction. One forward pass of every batch.

    Raises:
        ValueError: if the model's states cannot be read in this way.
    """
    correct, logprobs = [], []
    with inference(model):
        for inputs in questions.batches("logit lens"):
            before, wanted = before_answers(inputs["labels"].cpu())
            words, word = wanted.unique(return_inverse=True)
            asked, _ = on_answers(inputs)
            with logit_lens(model, token_map(model, inputs), before, top=1, track=words.tolist()) as read:
                model(**asked)
            correct.append(read.ids[..., 0] == wanted)
            logprobs.append(read.tracked_logprobs[:, torch.arange(len(word)), word].double())
    right, logprob = torch.cat(correct, 1), torch.cat(logprobs, 1)
    return {
        "label": "the right answer's first token",
        "samples": right.shape[1],
        "depths": [
            {"correct": digits(row), "logprob": round(mean, _DIGITS)}
            for row, mean in zip(right, logprob.mean(1).tolist(), strict=True)
        ],
    }


def before_answers(
    labels: Int[Tensor, "batch positions"],
) -> tuple[Bool[Tensor, "batch positions"], Int[Tensor, " batch"]]:
    """Of each row, the position that predicts its first labelled token, and that token."""
    labelled = labels[:, 1:] != IGNORED
    first = labelled & (labelled.cumsum(1) == 1)
    return pad(first, (0, 1)), labels[:, 1:][first]


READOUT_FOLDS = 5


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
