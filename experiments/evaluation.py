"""Exact-match accuracy on held-out questions, one question at a time."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from experiments.data.conversation import IGNORED, Collator, Encoded, Encoder, on_answers
from experiments.data.samples import Picture, Sample
from experiments.features import Features
from experiments.models import inference
from experiments.reduction import Around, untouched
from llava_mini.video import Video

Inputs = dict[str, Tensor]
GREY = (128, 128, 128)


class Questions:
    """Questions encoded once, served as left-padded batches as often as wanted: with pixels, or with `features` of the
    split that they are about."""

    def __init__(
        self,
        samples: Sequence[Sample],
        processor: ProcessorMixin,
        batch_size: int,
        device: torch.device,
        features: Features | None = None,
    ) -> None:
        encode: Callable[[Sample], Encoded] = Encoder(processor)
        if features is not None:
            encode = partial(features.encoded, encode)
        self.samples, self.device, self.features = samples, device, features
        with tqdm(samples, desc="encode", leave=False) as bar:
            self.items = [encode(sample) for sample in bar]
        self._collate = Collator(processor, side="left")
        self._loader = DataLoader(self.items, batch_size, collate_fn=self._collate)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.items)

    def batches(self, say: str) -> Iterator[Inputs]:
        for batch in tqdm(self._loader, desc=say, leave=False):
            yield self._here(batch)

    def given(self) -> AbstractContextManager[None]:
        """While inside, a model takes what the batches hold in the place of pixels."""
        return self.features.given() if self.features else contextlib.nullcontext()

    def first(self) -> Inputs:
        """The first question alone."""
        return self._here(self._collate(self.items[:1]))

    def _here(self, batch: Inputs) -> Inputs:
        return {name: tensor.to(self.device) for name, tensor in batch.items()}


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
