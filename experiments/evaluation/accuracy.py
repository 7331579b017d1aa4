"""Exact-match accuracy on held-out questions, one question at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from experiments.data.encoding import IGNORED, on_answers
from experiments.data.samples import Picture, Sample
from experiments.devices import inference
from experiments.evaluation.questions import Inputs, Questions
from experiments.models.token_reduction import Around, untouched
from llava_mini.video import Video

GREY = (128, 128, 128)


def greedy_matches(
    logits: Float[Tensor, "batch positions vocabulary"], labels: Int[Tensor, "batch last"]
) -> Bool[Tensor, " batch"]:
    """Whether greedy decoding would write exactly the labelled answer, its end-of-turn token included. Labels are of the
    last positions, or of all.

    Given the right answer so far, the most likely next token is the right one at every step: that is what greedy
    decoding does, so one teacher-forced pass tells the outcome of `generate` without running it.
    """
    said, wanted = logits[:, -labels.shape[1] : -1].argmax(-1), labels[:, 1:]
    return ((said == wanted) | (wanted == IGNORED)).all(-1)


def answered(model: PreTrainedModel, inputs: Inputs) -> Bool[Tensor, " batch"]:
    """Which rows of a batch the model answers right, by one forward call."""
    asked, labels = on_answers(inputs)
    return greedy_matches(model(**asked).logits, labels)


def correct(
    model: PreTrainedModel, questions: Questions, say: str, around: Around = untouched
) -> Bool[Tensor, " questions"]:
    """Which questions are answered right, with `around` around every forward call."""
    outcomes = []
    with inference(model), questions.given():
        for inputs in questions.batches(say):
            with around(model, inputs):
                outcomes.append(answered(model, inputs).cpu())
    return torch.cat(outcomes)


def blank(samples: Sequence[Sample]) -> list[Sample]:
    """The same questions about grey pictures of the same size, and of a video as many frames."""

    def grey(load: Callable[[], Picture]) -> Picture:
        picture = load()
        if isinstance(picture, Video):
            return Video([Image.new("RGB", next(iter(picture)).size, GREY)] * len(picture))
        return Image.new("RGB", picture.size, GREY)

    return [replace(s, load=tuple(partial(grey, load) for load in s.load)) for s in samples]


def shuffled(samples: Sequence[Sample]) -> list[Sample]:
    """The same questions, each about the pictures that belong to the question half the set away, among those that have
    as many images and videos in the same order."""
    alike: dict[tuple[str, ...], list[Sample]] = defaultdict(list)
    for sample in samples:
        alike[tuple(sample.slots)].append(sample)
    others = {slots: iter([*some[len(some) // 2 :], *some[: len(some) // 2]]) for slots, some in alike.items()}
    return [replace(s, load=next(others[tuple(s.slots)]).load) for s in samples]


def digits(outcomes: Bool[Tensor, " questions"] | Bool[np.ndarray, " questions"]) -> str:
    """One character a question, as records keep them: 1 is right."""
    return "".join("1" if right else "0" for right in outcomes.tolist())


def by_kind(record: dict[str, Any]) -> str:
    """Percent right by question kind: with the picture, under each control, and by guessing from the text alone."""
    views = {**record["accuracy"]} | ({"text-only guess": record["data"]["guess"]} if "guess" in record["data"] else {})
    right = pd.DataFrame({name: [100 * int(digit) for digit in digits] for name, digits in views.items()})
    grouped = right.groupby(pd.Series(record["data"]["kinds"], name="kind"))
    table = pd.concat([grouped.size().rename("n"), grouped.mean()], axis=1)
    table.loc["all"] = [len(right), *right.mean()]
    table["n"] = table["n"].astype(int)
    return table.round(1).to_string()
