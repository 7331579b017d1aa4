"""Exact-match accuracy on held-out questions, one question at a time, and its blind controls."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather_object
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from experiments.data.encoding import IGNORE_INDEX, restrict_to_answers
from experiments.data.samples import Sample, VisualInput
from experiments.devices import inference_mode
from experiments.evaluation.questions import EncodedQuestions
from experiments.models.token_reduction import TokenDropper, keep_all_tokens
from experiments.records.generated import score_name
from llava_mini.video import Video

BLANK_COLOUR = (128, 128, 128)


def greedy_matches(
    logits: Float[Tensor, "batch positions vocabulary"], labels: Int[Tensor, "batch last"]
) -> Bool[Tensor, " batch"]:
    """Return whether greedy decoding would write exactly the labelled answer and its end-of-turn token.

    Greedy decoding writes the answer if, given the right tokens so far, the most likely next token is right at every
    step. So one teacher-forced pass gives the outcome of `generate` without running it.

    Args:
        logits: Logits of a teacher-forced pass.
        labels: Labels of the last positions, or of all, -100 outside answers.
    """
    predicted, target = logits[:, -labels.shape[1] : -1].argmax(-1), labels[:, 1:]
    return ((predicted == target) | (target == IGNORE_INDEX)).all(-1)


def greedy_answers(
    logits: Float[Tensor, "batch positions vocabulary"], labels: Int[Tensor, "batch last"]
) -> list[list[int]]:
    """Return the tokens that greedy decoding would write, up to the first one that is not in the labelled answer.

    Up to there the teacher-forced tokens are those of greedy decoding. What it would write after a wrong token is unknown.

    Args:
        logits: Logits of a teacher-forced pass.
        labels: Labels of the last positions, or of all, -100 outside answers.
    """
    predicted, target = logits[:, -labels.shape[1] : -1].argmax(-1), labels[:, 1:]
    wrong_before = ((predicted != target) & (target != IGNORE_INDEX)).cumsum(dim=1).roll(1, dims=1)
    wrong_before[:, 0] = 0
    written = (target != IGNORE_INDEX) & (wrong_before == 0)
    return [row[mask].tolist() for row, mask in zip(predicted, written, strict=True)]


def correct_answers(
    model: PreTrainedModel,
    questions: EncodedQuestions,
    progress_label: str,
    drop_tokens: TokenDropper = keep_all_tokens,
) -> Bool[Tensor, " questions"]:
    """Return which questions the model answers correctly.

    Args:
        model: The model.
        questions: The questions.
        progress_label: Label of the progress bar.
        drop_tokens: Drops visual tokens in each forward call.
    """
    return answer_questions(model, questions, progress_label, drop_tokens)[0]


def answer_questions(
    model: PreTrainedModel,
    questions: EncodedQuestions,
    progress_label: str,
    drop_tokens: TokenDropper = keep_all_tokens,
) -> tuple[Bool[Tensor, " questions"], list[list[int]]]:
    """Return which questions the model answers correctly, and the tokens of its answers as `greedy_answers` does.

    Args:
        model: The model.
        questions: The questions.
        progress_label: Label of the progress bar.
        drop_tokens: Drops visual tokens in each forward call.
    """
    outcomes, answers = [], []
    with inference_mode(model), questions.features_as_pixel_values():
        for inputs in questions.batches(progress_label):
            with drop_tokens(model, inputs):
                model_inputs, labels = restrict_to_answers(inputs)
                logits = model(**model_inputs).logits
            outcomes.append(greedy_matches(logits, labels).cpu())
            answers += greedy_answers(logits, labels)
    return torch.cat(outcomes), answers


def validation_scores(
    model: PreTrainedModel, questions: EncodedQuestions, drop_tokens: TokenDropper = keep_all_tokens
) -> dict[str, float]:
    """Return the accuracy of a model on a validation split, and the loss of the right answers in the same forward calls.

    In a distributed training each process answers its share of the questions, and all get the same result.

    Args:
        model: The model.
        questions: The questions of the split.
        drop_tokens: Drops visual tokens in each forward call.

    Returns:
        `accuracy` from 0 to 1, and `loss` in nats per token of the answers.
    """
    sums = torch.zeros(3, dtype=torch.float64)  # right answers, loss, tokens
    process = PartialState()
    with inference_mode(model), questions.features_as_pixel_values():
        batches = islice(questions.batches("validation"), process.process_index, None, process.num_processes)
        for inputs in batches:
            with drop_tokens(model, inputs):
                model_inputs, labels = restrict_to_answers(inputs)
                logits = model(**model_inputs).logits
            loss = F.cross_entropy(
                logits[:, -labels.shape[1] : -1].flatten(0, 1).float(),
                labels[:, 1:].flatten(),
                ignore_index=IGNORE_INDEX,
                reduction="sum",
            )
            tokens = (labels[:, 1:] != IGNORE_INDEX).sum()
            sums += torch.stack([greedy_matches(logits, labels).sum(), loss, tokens]).to(sums)
    right, loss_sum, token_count = torch.stack(gather_object([sums])).sum(0).tolist()
    return {"accuracy": right / len(questions), "loss": loss_sum / token_count}


def blank_images(samples: Sequence[Sample]) -> list[Sample]:
    """Replace each image by a grey image of the same size, and each video by as many grey frames."""

    def load_blank(load: Callable[[], VisualInput]) -> VisualInput:
        original = load()
        if isinstance(original, Video):
            return Video([Image.new("RGB", next(iter(original)).size, BLANK_COLOUR)] * len(original))
        return Image.new("RGB", original.size, BLANK_COLOUR)

    return [replace(s, loaders=tuple(partial(load_blank, load) for load in s.loaders)) for s in samples]


def shuffled_images(samples: Sequence[Sample]) -> list[Sample]:
    """Give each question the images of another question: the one half the set away, or the next that has other images.

    Questions exchange images only with questions that have as many images and videos in the same order. A question that
    finds no other images gets grey ones.
    """
    same_placeholders: dict[tuple[str, ...], list[Sample]] = defaultdict(list)
    for sample in samples:
        same_placeholders[tuple(sample.placeholders)].append(sample)
    shuffled: dict[int, Sample] = {}
    for group in same_placeholders.values():
        half = len(group) // 2
        for number, sample in enumerate(group):
            donors = (group[(number + half + step) % len(group)] for step in range(len(group)))
            donor = next((other for other in donors if other.loaders != sample.loaders), None)
            shuffled[id(sample)] = replace(sample, loaders=donor.loaders) if donor else blank_images([sample])[0]
    return [shuffled[id(sample)] for sample in samples]


def outcome_digits(outcomes: Bool[Tensor, " questions"] | Bool[np.ndarray, " questions"]) -> str:
    """Return outcomes as records store them: one character per question, 1 if it is correct and 0 if not."""
    return "".join("1" if outcome else "0" for outcome in outcomes.tolist())


def accuracy_by_question_type(record: dict[str, Any]) -> str:
    """Return a printable table of a record's accuracies in percent, by question type.

    Its columns are the accuracy with the image, under each blind control, and of the text-only baseline, and the score of
    generated answers.
    """
    outcomes = {**record["accuracy"]}
    if "guess" in record["data"]:
        outcomes["text-only guess"] = record["data"]["guess"]
    percent = pd.DataFrame({name: [100 * int(digit) for digit in digits] for name, digits in outcomes.items()})
    if (generated := record.get("generated")) is not None:
        percent[score_name(generated)] = 100 * np.array(generated["image"]["scores"])
    grouped = percent.groupby(pd.Series(record["data"]["kinds"], name="question type"))
    table = pd.concat([grouped.size().rename("n"), grouped.mean()], axis=1)
    total = [[len(percent), *percent.mean()]]
    # a question type may be named "all" too
    table = pd.concat([table, pd.DataFrame(total, pd.Index(["all"], name=table.index.name), table.columns)])
    return table.round(1).to_string()
