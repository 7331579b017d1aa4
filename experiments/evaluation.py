"""Exact-match accuracy on held-out questions, one question at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from experiments.data.conversation import IGNORED, Collator, Encoder
from experiments.data.samples import Sample
from experiments.models import inference

Inputs = dict[str, Tensor]
Around = Callable[[Inputs], contextlib.AbstractContextManager[Any]]


class Questions:
    """Questions encoded once, served as left-padded batches as often as wanted."""

    def __init__(
        self, samples: Sequence[Sample], processor: ProcessorMixin, batch_size: int, device: torch.device
    ) -> None:
        encoder = Encoder(processor)
        self.device = device
        self.items = [
            {**encoder(sample), "image": sample.image} for sample in tqdm(samples, desc="encode", leave=False)
        ]
        self._loader = DataLoader(self.items, batch_size, collate_fn=Collator(processor, side="left"))  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.items)

    def batches(self, say: str) -> Iterator[Inputs]:
        for batch in tqdm(self._loader, desc=say, leave=False):
            yield {name: tensor.to(self.device) for name, tensor in batch.items()}


def greedy_matches(
    logits: Float[Tensor, "batch positions vocabulary"], labels: Int[Tensor, "batch positions"]
) -> Bool[Tensor, " batch"]:
    """Whether greedy decoding would write exactly the labelled answer, its end-of-turn token included.

    Given the right answer so far, the most likely next token is the right one at every step: that is what greedy
    decoding does, so one teacher-forced pass tells the outcome of `generate` without running it.
    """
    said, wanted = logits[:, :-1].argmax(-1), labels[:, 1:]
    return ((said == wanted) | (wanted == IGNORED)).all(-1)


def no_change(_: Inputs) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def correct(
    model: PreTrainedModel, questions: Questions, say: str, around: Around = no_change
) -> Bool[Tensor, " questions"]:
    """Which questions are answered right, each forward pass run inside `around(inputs)`."""
    outcomes = []
    with inference(model):
        for inputs in questions.batches(say):
            with around(inputs):
                logits = model(**inputs).logits
            outcomes.append(greedy_matches(logits, inputs["labels"]).cpu())
    return torch.cat(outcomes)


def blank(samples: Sequence[Sample]) -> list[Sample]:
    """The same questions about a grey picture of the same size."""

    def grey(image: Image.Image) -> Image.Image:
        return Image.new("RGB", image.size, (128, 128, 128))

    return [replace(s, load=partial(grey, s.image)) if s.image else s for s in samples]


def shuffled(samples: Sequence[Sample]) -> list[Sample]:
    """The same questions, each about the picture that belongs to the question half the set away."""
    half = len(samples) // 2
    others = [*samples[half:], *samples[:half]]
    return [replace(s, load=other.load) for s, other in zip(samples, others, strict=True)]


def as_digits(outcomes: Bool[Tensor, " questions"]) -> str:
    """One character a question, as records keep them: 1 is right."""
    return "".join("1" if right else "0" for right in outcomes.tolist())
