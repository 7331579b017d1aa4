"""Samples of a data set (images or videos with a LLaVA conversation), splits of them, and the text-only baseline."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from PIL import Image

from experiments.data.bad_entries import BadEntry

if TYPE_CHECKING:  # importing llava_mini takes seconds
    from llava_mini.video import Video

IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER = "<image>", "<video>"
PLACEHOLDER = re.compile(f"{IMAGE_PLACEHOLDER}|{VIDEO_PLACEHOLDER}")
VisualInput: TypeAlias = "Image.Image | Video"


@dataclass(frozen=True)
class IndexedImageLoader:
    """Loads an image of a split, and knows the image's index without loading it.

    Loaders with equal `make` are equal: the same image can have several indices.

    Args:
        index: Index of the image among all images of its split, from 0.
        make: Reads or renders the image.
    """

    index: int = field(compare=False)
    make: Callable[[], Image.Image]

    def __call__(self) -> Image.Image:
        """Read or render the image."""
        return self.make()


@dataclass(frozen=True)
class Sample:
    """Images and videos with a conversation about them, in the format of LLaVA's training files.

    Args:
        id: The sample's name.
        loaders: Read or render the image or video of each placeholder; empty for text alone.
        conversations: Turns `{"from": "human", "value": ...}` and `{"from": "gpt", "value": ...}`, alternating. The human
            turns hold `<image>` or `<video>` for each entry of `loaders`, in order.
        question_types: The type of each question: one entry per answer.
        system: The system prompt; None leaves it to the chat template.
        annotators: The annotators' answers to each question, for scores that need them; None if there are none.
    """

    id: str
    loaders: tuple[Callable[[], VisualInput], ...]
    conversations: list[dict[str, str]]
    question_types: list[str]
    system: str | None = None
    annotators: list[list[str]] | None = None

    @property
    def visual_inputs(self) -> list[VisualInput]:
        """The images and videos. A video decodes its frames only when they are iterated.

        They are loaded at each access: the decoded images of all questions of a test split can exceed memory.
        """
        return [load() for load in self.loaders]

    @property
    def image(self) -> Image.Image | None:
        """The image of a sample about exactly one image; None for any other sample."""
        only = self.visual_inputs[0] if len(self.loaders) == 1 else None
        return only if isinstance(only, Image.Image) else None

    @property
    def placeholders(self) -> list[str]:
        """`<image>` or `<video>` for each visual input, in the order of the text."""
        return [placeholder for turn in self.conversations[::2] for placeholder in PLACEHOLDER.findall(turn["value"])]

    @property
    def questions(self) -> list[str]:
        """The text of each human turn, without placeholders."""
        return [PLACEHOLDER.sub("", turn["value"]).strip() for turn in self.conversations[::2]]

    @property
    def answers(self) -> list[str]:
        """The text of each answer."""
        return [turn["value"] for turn in self.conversations[1::2]]


@dataclass(frozen=True)
class Split:
    """One split of a data set.

    Args:
        name: "train", "validation" or "test".
        samples: The samples; may build each one on access.
        fingerprint: Hash that stands for the samples. Of images and videos in files it covers names and sizes in bytes.
        image_count: How many images have an `IndexedImageLoader`; their indices are 0 to image_count - 1.
        skipped: Entries of the user's files that are left out; None for a data set that leaves out none.
        image_files: The files that the images are read from, by index; empty if none has a file of its own.
    """

    name: str
    samples: Sequence[Sample]
    fingerprint: str
    image_count: int = 0
    skipped: tuple[BadEntry, ...] | None = None
    image_files: tuple[Path, ...] = ()

    def __len__(self) -> int:
        return len(self.samples)


def llava_conversation(
    pairs: Iterable[tuple[str, str]], placeholders: Iterable[str] = (IMAGE_PLACEHOLDER,)
) -> list[dict[str, str]]:
    """Build a conversation in LLaVA's format.

    Args:
        pairs: Questions with their answers.
        placeholders: `<image>` or `<video>` for each visual input; all are put before the first question.

    Returns:
        Alternating human and gpt turns.
    """
    turns: list[dict[str, str]] = []
    for question, answer in pairs:
        prefix = "" if turns else "".join(f"{placeholder}\n" for placeholder in placeholders)
        turns += [{"from": "human", "value": prefix + question}, {"from": "gpt", "value": answer}]
    return turns


def single_questions(samples: Iterable[Sample]) -> Iterator[Sample]:
    """Yield a sample for each question alone, so that no earlier answer helps with a later one.

    A question keeps the images and videos of its turn where they stand. Those of earlier turns come before it, and those
    of later turns are left out.
    """
    for sample in samples:
        earlier: list[str] = []
        for i, (question, answer) in enumerate(zip(sample.conversations[::2], sample.answers, strict=True)):
            text = "".join(f"{placeholder}\n" for placeholder in earlier) + question["value"].strip()
            turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
            earlier += PLACEHOLDER.findall(question["value"])
            loaders = sample.loaders[: len(earlier)]
            annotators = None if sample.annotators is None else [sample.annotators[i]]
            types = [sample.question_types[i]]
            yield Sample(f"{sample.id}.{i}", loaders, turns, types, sample.system, annotators)


class OneQuestionPerImage(Sequence[Sample]):
    """One question of each sample, the question types in turn, so that no two test outcomes share an image."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        singles = sorted(single_questions([self.samples[index]]), key=lambda single: single.question_types)
        return singles[index % len(singles)]


class TextOnlyBaseline:
    """Answers from the question text alone, by table look-up: the most frequent training answer.

    A question text that occurs in training gets its most frequent answer. Any other gets the most frequent answer to its
    question type.

    Args:
        samples: Training samples. Their visual inputs are not loaded.
    """

    def __init__(self, samples: Iterable[Sample]) -> None:
        by_question: dict[str, Counter[str]] = defaultdict(Counter)
        by_type: dict[str, Counter[str]] = defaultdict(Counter)
        for sample in samples:
            for question, answer, question_type in zip(
                sample.questions, sample.answers, sample.question_types, strict=True
            ):
                by_question[question][answer] += 1
                by_type[question_type][answer] += 1
        # Ties go to the alphabetically first answer, so that the order of the samples does not matter.
        self._by_question, self._by_type = (
            {key: min(counts, key=lambda answer: (-counts[answer], answer)) for key, counts in table.items()}
            for table in (by_question, by_type)
        )

    def __call__(self, question: str, question_type: str) -> str | None:
        """Return the predicted answer; None for a question type that training lacks."""
        return self._by_question.get(question, self._by_type.get(question_type))


def check_image_count(count: int, split: str) -> int:
    """Return `count` if it is a number of images or clips that can be generated.

    Args:
        count: How many to generate.
        split: The name of the split, for the message.

    Raises:
        ValueError: If `count` is less than 1.
    """
    if count < 1:
        raise ValueError(f"data.{split}_samples: generated data has no end, so it must be at least 1, found {count}")
    return count


def fingerprint(*parts: object) -> str:
    """Return 16 hex digits that identify bytes or any values that JSON can hold."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]
