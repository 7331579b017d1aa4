"""Questions about scenes of shapes: six kinds, answers balanced so that the text alone says little."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import permutations, product

import numpy as np
from PIL import Image

from experiments.data import scenes as drawing
from experiments.data.balanced_questions import Pair, ask, beside, cell_name
from experiments.data.samples import Numbered, Sample, Split, at_least_one, conversation, fingerprint
from experiments.data.scenes import COLOURS, GRID, SHAPES

Thing = tuple[str, str] | None  # (colour, shape) of a cell, None where it is empty


PLURAL = {"square": "squares", "triangle": "triangles", "ring": "rings", "cross": "crosses"}


MOST_COUNTED = 4


def place(cells: Sequence[Thing]) -> list[Pair]:
    return [
        (f"what {word} is at {cell_name(i, GRID)}?", answer)
        for i, thing in enumerate(cells)
        if thing
        for word, answer in zip(("colour", "shape"), thing, strict=True)
    ]


def existence(cells: Sequence[Thing]) -> list[Pair]:
    there = set(cells)
    return [(f"is there a {c} {s}?", "yes" if (c, s) in there else "no") for c, s in product(COLOURS, SHAPES)]


def _counts(cells: Sequence[Thing]) -> tuple[dict[str, int], dict[str, int]]:
    found = Counter(word for thing in cells if thing for word in thing)
    return {f"{c} shapes": found[c] for c in COLOURS}, {PLURAL[s]: found[s] for s in SHAPES}


def count(cells: Sequence[Thing]) -> list[Pair]:
    colours, shapes = _counts(cells)
    return [(f"how many {k} are there?", str(n)) for k, n in (colours | shapes).items() if n <= MOST_COUNTED]


def comparison(cells: Sequence[Thing]) -> list[Pair]:
    return [
        (f"are there more {a} than {b}?", "yes" if counts[a] > counts[b] else "no")
        for counts in _counts(cells)
        for a, b in permutations(counts, 2)
    ]


def _asked(template: str, reference: Thing, thing: Thing) -> list[Pair]:
    assert reference
    assert thing
    name = f"the {reference[0]} {reference[1]}"
    return [(template.format(w, name), answer) for w, answer in zip(("colour", "shape"), thing, strict=True)]


def relation(cells: Sequence[Thing]) -> list[Pair]:
    """What lies beside a thing that the scene has once."""
    pairs = []
    for i, thing in enumerate(cells):
        if not thing or cells.count(thing) > 1:
            continue
        for word, j in beside(i, GRID):
            if neighbour := cells[j]:
                pairs += _asked(f"what {{}} is {word} {{}}?", thing, neighbour)
    return pairs


def reading(cells: Sequence[Thing]) -> list[Pair]:
    """What comes two things later in reading order (empty cells do not count) than a thing that the scene has once."""
    things = [thing for thing in cells if thing]
    pairs = []
    for thing, later in zip(things, things[2:], strict=False):
        if things.count(thing) == 1:
            pairs += _asked("in reading order, what {} comes two after {}?", thing, later)
    return pairs


KINDS: dict[str, Callable[[Sequence[Thing]], list[Pair]]] = {
    "place": place,
    "existence": existence,
    "count": count,
    "relation": relation,
    "comparison": comparison,
    "reading": reading,
}


ONE_EACH = dict.fromkeys(KINDS, 1)


class ShapeSamples(Sequence[Sample]):
    """Samples made when asked for: a scene takes a few hundred bytes until it is drawn."""

    def __init__(self, split: str, scenes: drawing.Scenes, seed: int, rounds: Mapping[str, int]) -> None:
        self.split, self.scenes, self.seed, self.rounds = split, scenes, seed, rounds

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        kinds, questions, answers = zip(*self.asked(index), strict=True)
        turns = conversation(zip(questions, answers, strict=True))
        return Sample(
            f"shapes-{self.split}-{self.seed}-{index}",
            (Numbered(index, partial(self.draw, index)),),
            turns,
            list(kinds),
        )

    def draw(self, index: int) -> Image.Image:
        return Image.fromarray(drawing.render(self.scenes[index : index + 1])[0])

    def described(self) -> Descriptions:
        """The same scenes with other conversations."""
        return Descriptions(self.split, self.scenes, self.seed, self.rounds)

    def things(self, index: int) -> list[Thing]:
        colours, shapes = list(COLOURS), SHAPES
        return [
            None if c < 0 else (colours[c], shapes[s])
            for c, s in zip(self.scenes.colour[index], self.scenes.shape[index], strict=True)
        ]

    def asked(self, index: int) -> list[tuple[str, str, str]]:
        cells = self.things(index)
        rng = np.random.default_rng([self.seed, int(self.scenes.noise_seed[index])])
        return ask({kind: candidates(cells) for kind, candidates in KINDS.items()}, self.rounds, rng)


class Descriptions(ShapeSamples):
    """The same scenes, each with one long answer: what is where, cell by cell in random order.

    Before any question is understood, this teaches a language model to find a place in the picture and to name what is
    there: eighteen looks at the picture in one answer. LLaVA's first stage learns from captions for the same reason.
    """

    def asked(self, index: int) -> list[tuple[str, str, str]]:
        cells = self.things(index)
        order = np.random.default_rng([self.seed, int(self.scenes.noise_seed[index])]).permutation(len(cells))
        told = [f"{cell_name(i, GRID)} {' '.join(cells[i] or ('nothing',))}" for i in order]
        return [("description", "describe the picture", ", ".join(told))]


def load_shapes(split: str, count: int, seed: int = 0, rounds: Mapping[str, int] = ONE_EACH) -> Split:
    """`count` scenes of a split with `rounds[kind]` questions of each kind. The same arguments give the same bytes."""
    scenes = drawing.draw(split, seed, at_least_one(count, split))
    samples = ShapeSamples(split, scenes, seed, rounds)
    drawn = [getattr(scenes, name).tobytes() for name in scenes.__dataclass_fields__]
    return Split(split, samples, fingerprint("shapes", split, count, seed, dict(rounds), *drawn), count)


def scenes_of(train: Split | None) -> ShapeSamples:
    """The training scenes, whose cells are known.

    Raises:
        ValueError: if this is another kind of data.
    """
    if train is None or not isinstance(train.samples, ShapeSamples):
        raise ValueError("model=scratch learns to see from scenes whose content is known; use it with data=shapes")
    return train.samples
