"""Clips of coloured shapes, one object a second, with questions that need the whole clip."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise, product

import numpy as np
from jaxtyping import Int
from PIL import Image

from experiments.data.balanced_questions import QuestionAnswer, draw_questions
from experiments.data.samples import (
    VIDEO_PLACEHOLDER,
    Sample,
    Split,
    VisualInput,
    check_image_count,
    fingerprint,
    llava_conversation,
)
from experiments.data.scenes import COLOURS, SHAPES, SPLIT_TENTHS, Scenes, draw_scenes, render_scenes

ClipObject = tuple[str, str]  # (colour, shape)
CLIP_SECONDS = range(4, 17)  # lengths of clips
MAX_CLIP_COUNT_ANSWER = 4


def clip_existence_questions(objects: Sequence[ClipObject]) -> list[QuestionAnswer]:
    """Return a yes-or-no question for each pair of colour and shape: does the clip ever show such an object?"""
    present = set(objects)
    return [(f"is there ever a {c} {s}?", "yes" if (c, s) in present else "no") for c, s in product(COLOURS, SHAPES)]


def clip_ends_questions(objects: Sequence[ClipObject]) -> list[QuestionAnswer]:
    """Return questions about colour and shape of the first and of the last object."""
    return [
        (f"what {attribute} comes {when}?", answer)
        for when, shown in (("first", objects[0]), ("last", objects[-1]))
        for attribute, answer in zip(("colour", "shape"), shown, strict=True)
    ]


def clip_order_questions(objects: Sequence[ClipObject]) -> list[QuestionAnswer]:
    """Return questions about what follows each object that the clip shows exactly once."""
    return [
        (f"what {attribute} comes right after the {' '.join(reference)}?", answer)
        for reference, later in pairwise(objects)
        if objects.count(reference) == 1
        for attribute, answer in zip(("colour", "shape"), later, strict=True)
    ]


def clip_count_questions(objects: Sequence[ClipObject]) -> list[QuestionAnswer]:
    """Return "how many" questions about colours that occur at most `MAX_CLIP_COUNT_ANSWER` times."""
    counts = Counter(colour for colour, _ in objects)
    return [(f"how many {c} shapes come?", str(counts[c])) for c in COLOURS if counts[c] <= MAX_CLIP_COUNT_ANSWER]


CLIP_QUESTION_TYPES: dict[str, Callable[[Sequence[ClipObject]], list[QuestionAnswer]]] = {
    "existence": clip_existence_questions,
    "ends": clip_ends_questions,
    "order": clip_order_questions,
    "count": clip_count_questions,
}


class ClipFrames(Sequence[Image.Image]):
    """The frames of a clip, one a second, each rendered on access."""

    def __init__(self, scenes: Scenes) -> None:
        self.scenes = scenes

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Image.Image:  # type: ignore[override]
        return Image.fromarray(render_scenes(self.scenes[index : index + 1])[0])


class ClipSamples(Sequence[Sample]):
    """Samples of clips, each with one question of each type.

    Args:
        split: Name of the split, for the sample ids.
        scenes: The frames of all clips, one after the other; each has one filled grid cell.
        starts: Index of the first frame of each clip, and the number of all frames.
        seed: Seed of the split, for the ids and for drawing questions.
        frames: How many frames of a clip the model gets, evenly spaced; 0 for one a second.
    """

    def __init__(self, split: str, scenes: Scenes, starts: Int[np.ndarray, " ends"], seed: int, frames: int) -> None:
        self.split, self.scenes, self.starts, self.seed, self.frames = split, scenes, starts, seed, frames

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        clip = self.scenes[self.starts[index] : self.starts[index + 1]]
        filled = clip.colour.argmax(axis=1)[:, None]  # empty cells have the lowest colour index, -1
        colours = list(COLOURS)
        objects = [
            (colours[c], SHAPES[s])
            for c, s in zip(
                np.take_along_axis(clip.colour, filled, 1)[:, 0],
                np.take_along_axis(clip.shape, filled, 1)[:, 0],
                strict=True,
            )
        ]
        rng = np.random.default_rng([self.seed, index])
        candidates = {name: candidates_of(objects) for name, candidates_of in CLIP_QUESTION_TYPES.items()}
        drawn = draw_questions(candidates, dict.fromkeys(CLIP_QUESTION_TYPES, 1), rng)
        question_types, questions, answers = zip(*drawn, strict=True)
        turns = llava_conversation(zip(questions, answers, strict=True), (VIDEO_PLACEHOLDER,))
        load = partial(_clip_video, ClipFrames(clip), self.frames or None)
        return Sample(f"clip-{self.split}-{self.seed}-{index}", (load,), turns, list(question_types))


def _clip_video(clip: ClipFrames, frames: int | None) -> VisualInput:
    # Importing llava_mini takes seconds, and computing a fingerprint does not need it.
    from llava_mini.video import Video

    return Video(clip, frames=frames)


def load_shapes_video(split: str, count: int, seed: int = 0, frames: int = 0) -> Split:
    """Generate a split of clips with questions. The same arguments give the same bytes.

    Args:
        split: "train", "validation" or "test".
        count: How many clips.
        seed: Seed of clips and questions.
        frames: How many frames of a clip the model gets, evenly spaced; 0 for one a second.

    Raises:
        ValueError: If `count` is less than 1 or `frames` is negative.
    """
    if frames < 0:
        raise ValueError(f"data.frames: must be at least 1, or 0 for one frame a second, found {frames}")
    rng = np.random.default_rng([seed, list(SPLIT_TENTHS).index(split)])
    seconds = rng.choice(CLIP_SECONDS, check_image_count(count, split))
    full = draw_scenes(split, seed, int(seconds.sum()))
    shown = np.where(full.colour >= 0, rng.random(full.colour.shape), -1).argmax(axis=1)[:, None]
    is_shown = np.arange(full.colour.shape[1]) == shown
    scenes = Scenes(
        np.where(is_shown, full.colour, -1),
        np.where(is_shown, full.shape, -1),
        full.centre,
        full.radius,
        full.noise_seed,
    )
    starts = np.concatenate([[0], seconds.cumsum()])
    return Split(
        split,
        ClipSamples(split, scenes, starts, seed, frames),
        fingerprint("clips", split, count, seed, frames, starts.tobytes(), scenes.colour.tobytes()),
    )
