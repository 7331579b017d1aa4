"""The right answer in hidden states, layer by layer: a logit lens, and a linear classifier."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from experiments.data.encoding import IGNORE_INDEX, restrict_to_answers
from experiments.devices import inference_mode
from experiments.evaluation.accuracy import outcome_digits
from experiments.evaluation.questions import EncodedQuestions, instruction_token_map
from probes import fusion_depth
from probes.fusion.curves import text_states
from probes.readouts.linear_probe import linear_readout
from probes.readouts.logit_lens import logit_lens

READOUT_FOLDS = 5
_DIGITS = 5  # decimal places of a mean log-probability in records


def measure_lens(model: PreTrainedModel, questions: EncodedQuestions) -> dict[str, Any]:
    """Measure the `lens` part of a record, with one forward pass per batch.

    After 0, 1, ... all layers it holds whether the right answer's first token ranks first of the vocabulary, one digit
    per question, and the token's mean log-probability in nats. States are read at the position that predicts the token,
    the last one of the prompt, by the model's own final norm and head. So after all layers it is the model's prediction.

    Raises:
        ValueError: If the logit lens cannot read the model.
    """
    correct_batches, logprob_batches = [], []
    with inference_mode(model):
        for inputs in questions.batches("logit lens"):
            positions, targets = answer_start(inputs["labels"].cpu())
            tracked, target_index = targets.unique(return_inverse=True)
            model_inputs, _ = restrict_to_answers(inputs)
            tokens = instruction_token_map(model, inputs)
            with logit_lens(model, tokens, positions, top=1, track=tracked.tolist()) as lens:
                model(**model_inputs)
            correct_batches.append(lens.ids[..., 0] == targets)
            logprob_batches.append(lens.tracked_logprobs[:, torch.arange(len(target_index)), target_index].double())
    correct, logprobs = torch.cat(correct_batches, 1), torch.cat(logprob_batches, 1)
    return {
        "label": "the right answer's first token",
        "samples": correct.shape[1],
        "depths": [
            {"correct": outcome_digits(row), "logprob": round(mean, _DIGITS)}
            for row, mean in zip(correct, logprobs.mean(1).tolist(), strict=True)
        ],
    }


def answer_start(
    labels: Int[Tensor, "batch positions"],
) -> tuple[Bool[Tensor, "batch positions"], Int[Tensor, " batch"]]:
    """Return the mask of the position that predicts each row's first labelled token, and that token."""
    labelled = labels[:, 1:] != IGNORE_INDEX
    first = labelled & (labelled.cumsum(1) == 1)
    return pad(first, (0, 1)), labels[:, 1:][first]


def measure_readout(model: PreTrainedModel, questions: EncodedQuestions) -> dict[str, Any]:
    """Measure the `readout` part of a record.

    After 0, 1, ... all layers, a linear classifier predicts the right answer from the question's hidden states. It is
    tested on images that it was not trained on.

    Raises:
        ValueError: If there are fewer than two different answers, or fewer images than folds.
    """
    with_image = [i for i, sample in enumerate(questions.samples) if sample.loaders]
    answers = [questions.samples[i].answers[0] for i in with_image]
    images = [questions.samples[i].loaders for i in with_image]
    if len(set(answers)) < 2 or len(set(images)) < READOUT_FOLDS:
        raise ValueError(
            f"the read-out needs {READOUT_FOLDS} images and 2 different answers, found {len(set(images))} and "
            f"{len(set(answers))}"
        )
    with inference_mode(model):
        batches = [
            text_states(model, instruction_token_map(model, inputs), restrict_to_answers(inputs)[0])
            for inputs in questions.batches("hidden states of the question")
        ]
    states = torch.cat(batches, dim=1)
    readout = linear_readout(states[:, with_image], answers, pictures=images, folds=READOUT_FOLDS)
    return {
        "label": "the right answer",
        "samples": len(with_image),
        "depths": [
            {"correct": outcome_digits(correct), "control": outcome_digits(control)}
            for correct, control in zip(readout.correct, readout.control, strict=True)
        ],
        "fusion": asdict(fusion_depth(readout.correct, "readout")),
    }
