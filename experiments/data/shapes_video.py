"""Clips of coloured shapes, one thing a second, and questions that need all of the clip."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import pairwise, product

import numpy as np
from jaxtyping import Int
from PIL import Image

from experiments.data import scenes as drawing
from experiments.data.balanced_questions import Pair, ask
from experiments.data.samples import VIDEO_SLOT, Picture, Sample, Split, at_least_one, conversation, fingerprint
from experiments.data.scenes import COLOURS, SHAPES, Scenes

Thing = tuple[str, str]  # (colour, shape)
SECONDS = range(4, 17)  # lengths of clips
MOST_COUNTED = 4


def existence(things: Sequence[Thing]) -> list[Pair]:
    there = set(things)
    return [(f"is there ever a {c} {s}?", "yes" if (c, s) in there else "no") for c, s in product(COLOURS, SHAPES)]


def ends(things: Sequence[Thing]) -> list[Pair]:
    return [
        (f"what {word} comes {when}?", answer)
        for when, thing in (("first", things[0]), ("last", things[-1]))
        for word, answer in zip(("colour", "shape"), thing, strict=True)
    ]


def order(things: Sequence[Thing]) -> list[Pair]:
    """What follows a thing that the clip has once."""
    return [
        (f"what {word} comes right after the {' '.join(thing)}?", answer)
        for thing, later in pairwise(things)
        if things.count(thing) == 1
        for word, answer in zip(("colour", "shape"), later, strict=True)
    ]


def count(things: Sequence[Thing]) -> list[Pair]:
    found = Counter(colour for colour, _ in things)
    return [(f"how many {c} shapes come?", str(found[c])) for c in COLOURS if found[c] <= MOST_COUNTED]


KINDS = {"existence": existence, "ends": ends, "order": order, "count": count}


def _video(clip: Clip, frames: int | None) -> Picture:
    from llava_mini.video import Video  # takes seconds, which data that is only fingerprinted need not

    return Video(clip, frames=frames)


class Clip(Sequence[Image.Image]):
    """The frames of a clip, one a second, each drawn when it is looked at."""

    def __init__(self, scenes: Scenes) -> None:
        self.scenes = scenes

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Image.Image:  # type: ignore[override]
        return Image.fromarray(drawing.render(self.scenes[index : index + 1])[0])


class ClipSamples(Sequence[Sample]):
    """A conversation about each clip, a question of each kind. `frames` of it are seen, spread evenly; 0 for one a
    second."""

    def __init__(self, split: str, scenes: Scenes, starts: Int[np.ndarray, " ends"], seed: int, frames: int) -> None:
        self.split, self.scenes, self.starts, self.seed, self.frames = split, scenes, starts, seed, frames

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        shown = self.scenes[self.starts[index] : self.starts[index + 1]]
        cell = shown.colour.argmax(axis=1)[:, None]  # an empty cell's colour is below all others
        colours = list(COLOURS)
        things = [
            (colours[c], SHAPES[s])
            for c, s in zip(
                np.take_along_axis(shown.colour, cell, 1)[:, 0],
                np.take_along_axis(shown.shape, cell, 1)[:, 0],
                strict=True,
            )
        ]
        rng = np.random.default_rng([self.seed, index])
        asked = ask({kind: candidates(things) for kind, candidates in KINDS.items()}, dict.fromkeys(KINDS, 1), rng)
        kinds, questions, answers = zip(*asked, strict=True)
        turns = conversation(zip(questions, answers, strict=True), (VIDEO_SLOT,))
        load = partial(_video, Clip(shown), self.frames or None)
        return Sample(f"clip-{self.split}-{self.seed}-{index}", (load,), turns, list(kinds))


def load_shapes_video(split: str, count: int, seed: int = 0, frames: int = 0) -> Split:
    """`count` clips of a split. The same arguments give the same bytes.

    Raises:
        ValueError: if there are no clips to make, or fewer than no frames.
    """
    if frames < 0:
        raise ValueError(f"data.frames: {frames} frames of a clip cannot be; use 1 or more, or 0 for one a second")
    rng = np.random.default_rng([seed, list(drawing.SPLITS).index(split)])
    seconds = rng.choice(SECONDS, at_least_one(count, split))
    full = drawing.draw(split, seed, int(seconds.sum()))
    kept = np.where(full.colour >= 0, rng.random(full.colour.shape), -1).argmax(axis=1)[:, None]
    alone = np.arange(full.colour.shape[1]) == kept
    scenes = Scenes(
        np.where(alone, full.colour, -1), np.where(alone, full.shape, -1), full.centre, full.radius, full.noise_seed
    )
    starts = np.concatenate([[0], seconds.cumsum()])
    return Split(
        split,
        ClipSamples(split, scenes, starts, seed, frames),
        fingerprint("clips", split, count, seed, frames, starts.tobytes(), scenes.colour.tobytes()),
    )
