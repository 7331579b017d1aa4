"""What a data set is here: pictures with conversations in LLaVA's format, and the guess that needs no picture."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

from PIL import Image

if TYPE_CHECKING:  # llava_mini takes seconds to import
    from llava_mini.video import Video

IMAGE_SLOT, VIDEO_SLOT = "<image>", "<video>"
SLOT = re.compile(f"{IMAGE_SLOT}|{VIDEO_SLOT}")
Picture: TypeAlias = "Image.Image | Video"


@dataclass(frozen=True)
class Numbered:
    """Draws or reads an image when it is called, and says without that which of its split's images it is."""

    number: int
    make: Callable[[], Image.Image]

    def __call__(self) -> Image.Image:
        return self.make()


@dataclass(frozen=True)
class Sample:
    """Pictures and what is said about them, as LLaVA's training files have it.

    `load` draws or reads each picture: none for text alone. `conversations` alternates `{"from": "human", "value": ...}`
    and `{"from": "gpt", "value": ...}`; the human turns hold `<image>` or `<video>` for each picture, in order. `kinds`
    names the type of each question, one an answer.
    """

    id: str
    load: tuple[Callable[[], Picture], ...]
    conversations: list[dict[str, str]]
    kinds: list[str]

    @cached_property
    def pictures(self) -> list[Picture]:
        """Drawn or read when they are first asked for; a video's frames only when they are gone through."""
        return [load() for load in self.load]

    @property
    def image(self) -> Image.Image | None:
        """The picture of a sample about one image; None for any other sample."""
        only = self.pictures[0] if len(self.load) == 1 else None
        return only if isinstance(only, Image.Image) else None

    @property
    def slots(self) -> list[str]:
        return [slot for turn in self.conversations[::2] for slot in SLOT.findall(turn["value"])]

    @property
    def questions(self) -> list[str]:
        return [SLOT.sub("", turn["value"]).strip() for turn in self.conversations[::2]]

    @property
    def answers(self) -> list[str]:
        return [turn["value"] for turn in self.conversations[1::2]]


@dataclass(frozen=True)
class Split:
    """A part of a data set. `samples` may make its items when asked for; the fingerprint stands for all of their bytes.
    `images` is how many of its pictures are `Numbered`, from 0."""

    name: str
    samples: Sequence[Sample]
    fingerprint: str
    images: int = 0

    def __len__(self) -> int:
        return len(self.samples)


def conversation(pairs: Iterable[tuple[str, str]], slots: Iterable[str] = (IMAGE_SLOT,)) -> list[dict[str, str]]:
    """Question and answer pairs -> LLaVA turns, with the slots of all pictures before the first question."""
    turns: list[dict[str, str]] = []
    for question, answer in pairs:
        shown = "" if turns else "".join(f"{slot}\n" for slot in slots)
        turns += [{"from": "human", "value": shown + question}, {"from": "gpt", "value": answer}]
    return turns


def single_questions(samples: Iterable[Sample]) -> Iterator[Sample]:
    """Each question as a conversation of its own, so that no earlier answer helps with a later one."""
    for sample in samples:
        for i, (question, answer) in enumerate(zip(sample.questions, sample.answers, strict=True)):
            turns = conversation([(question, answer)], sample.slots)
            yield Sample(f"{sample.id}.{i}", sample.load, turns, [sample.kinds[i]])


class OneQuestionEach(Sequence[Sample]):
    """One question about each picture, the kinds in turn, so that no two outcomes of a test hang on the same picture."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        singles = sorted(single_questions([self.samples[index]]), key=lambda single: single.kinds)
        return singles[index % len(singles)]


class TextGuess:
    """The best that can be done without the image by table look-up: the most frequent training answer.

    To a question text that training had, its most frequent answer; else the most frequent answer to its kind.
    """

    def __init__(self, samples: Iterable[Sample]) -> None:
        by_question: dict[str, Counter[str]] = defaultdict(Counter)
        by_kind: dict[str, Counter[str]] = defaultdict(Counter)
        for sample in samples:
            for question, answer, kind in zip(sample.questions, sample.answers, sample.kinds, strict=True):
                by_question[question][answer] += 1
                by_kind[kind][answer] += 1
        # ties go to the answer first in the alphabet, so that the guess does not hang on the order of the samples
        self._by_question, self._by_kind = (
            {key: min(counts, key=lambda a: (-counts[a], a)) for key, counts in table.items()}
            for table in (by_question, by_kind)
        )

    def __call__(self, question: str, kind: str) -> str | None:
        return self._by_question.get(question, self._by_kind.get(kind))


def at_least_one(count: int, field: str) -> int:
    """A number of pictures to make.

    Raises:
        ValueError: if it is none.
    """
    if count < 1:
        raise ValueError(f"data.{field}: {count} pictures cannot be made; generated data has no end, so say how many")
    return count


def fingerprint(*parts: object) -> str:
    """16 hex digits for bytes or anything that JSON can hold."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]
