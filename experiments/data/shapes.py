"""Questions of six types about scenes of shapes, with balanced answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import permutations, product

import numpy as np
from PIL import Image

from experiments.data.balanced_questions import (
    QuestionAnswer,
    TypedQuestion,
    draw_questions,
    grid_cell_name,
    neighbours,
)
from experiments.data.samples import (
    IndexedImageLoader,
    Sample,
    Split,
    check_image_count,
    fingerprint,
    llava_conversation,
)
from experiments.data.scenes import COLOURS, GRID_SIZE, SHAPES, Scenes, draw_scenes, render_scenes

CellContent = tuple[str, str] | None  # (colour, shape) of a grid cell's object, None for an empty cell
PLURAL_NAMES = {"square": "squares", "triangle": "triangles", "ring": "rings", "cross": "crosses"}
MAX_COUNT_ANSWER = 4


def place_questions(cells: Sequence[CellContent]) -> list[QuestionAnswer]:
    """Return questions about the colour and the shape in each filled grid cell."""
    return [
        (f"what {attribute} is at {grid_cell_name(i, GRID_SIZE)}?", answer)
        for i, content in enumerate(cells)
        if content
        for attribute, answer in zip(("colour", "shape"), content, strict=True)
    ]


def existence_questions(cells: Sequence[CellContent]) -> list[QuestionAnswer]:
    """Return a yes-or-no question for each pair of colour and shape: does the scene hold such an object?"""
    present = set(cells)
    return [(f"is there a {c} {s}?", "yes" if (c, s) in present else "no") for c, s in product(COLOURS, SHAPES)]


def count_questions(cells: Sequence[CellContent]) -> list[QuestionAnswer]:
    """Return "how many" questions about colours and shapes that occur at most `MAX_COUNT_ANSWER` times."""
    colours, shapes = _property_counts(cells)
    return [(f"how many {k} are there?", str(n)) for k, n in (colours | shapes).items() if n <= MAX_COUNT_ANSWER]


def comparison_questions(cells: Sequence[CellContent]) -> list[QuestionAnswer]:
    """Return yes-or-no questions that compare the counts of two colours or of two shapes."""
    return [
        (f"are there more {a} than {b}?", "yes" if counts[a] > counts[b] else "no")
        for counts in _property_counts(cells)
        for a, b in permutations(counts, 2)
    ]


def _property_counts(cells: Sequence[CellContent]) -> tuple[dict[str, int], dict[str, int]]:
    counts = Counter(word for content in cells if content for word in content)
    return {f"{c} shapes": counts[c] for c in COLOURS}, {PLURAL_NAMES[s]: counts[s] for s in SHAPES}


def relation_questions(cells: Sequence[CellContent]) -> list[QuestionAnswer]:
    """Return questions about the nearest objects in row and column of each object that the scene holds once."""
    pairs = []
    for i, content in enumerate(cells):
        if not content or cells.count(content) > 1:
            continue
        for direction, j in neighbours(i, GRID_SIZE, [c is not None for c in cells]):
            pairs += _colour_and_shape_questions(f"what {{}} is {direction} {{}}?", content, cells[j])
    return pairs


def reading_questions(cells: Sequence[CellContent]) -> list[QuestionAnswer]:
    """Return questions about the object two after each unique object in reading order. Empty cells do not count."""
    objects = [content for content in cells if content]
    pairs = []
    for reference, later in zip(objects, objects[2:], strict=False):
        if objects.count(reference) == 1:
            pairs += _colour_and_shape_questions("in reading order, what {} comes two after {}?", reference, later)
    return pairs


def _colour_and_shape_questions(template: str, reference: CellContent, answer: CellContent) -> list[QuestionAnswer]:
    assert reference
    assert answer
    name = f"the {reference[0]} {reference[1]}"
    return [(template.format(word, name), value) for word, value in zip(("colour", "shape"), answer, strict=True)]


QUESTION_TYPES: dict[str, Callable[[Sequence[CellContent]], list[QuestionAnswer]]] = {
    "place": place_questions,
    "existence": existence_questions,
    "count": count_questions,
    "relation": relation_questions,
    "comparison": comparison_questions,
    "reading": reading_questions,
}
ONE_PER_TYPE = dict.fromkeys(QUESTION_TYPES, 1)


class ShapeSamples(Sequence[Sample]):
    """Samples of scenes, built on access. A scene takes a few hundred bytes until it is rendered.

    Args:
        split: Name of the split, for the sample ids.
        scenes: The scenes.
        seed: Seed of the split, for the ids and for drawing questions.
        questions_per_type: How many questions of each type a sample has.
    """

    def __init__(self, split: str, scenes: Scenes, seed: int, questions_per_type: Mapping[str, int]) -> None:
        self.split, self.scenes, self.seed, self.questions_per_type = split, scenes, seed, questions_per_type

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        question_types, questions, answers = zip(*self.draw_questions(index), strict=True)
        turns = llava_conversation(zip(questions, answers, strict=True))
        return Sample(
            f"shapes-{self.split}-{self.seed}-{index}",
            (IndexedImageLoader(index, partial(self.render, index)),),
            turns,
            list(question_types),
        )

    def render(self, index: int) -> Image.Image:
        """Return the image of a scene."""
        return Image.fromarray(render_scenes(self.scenes[index : index + 1])[0])

    def with_descriptions(self) -> SceneDescriptions:
        """Return samples of the same scenes whose conversations are descriptions."""
        return SceneDescriptions(self.split, self.scenes, self.seed, self.questions_per_type)

    def cell_contents(self, index: int) -> list[CellContent]:
        """Return the colour and shape in each grid cell of a scene, in reading order."""
        colours, shapes = list(COLOURS), SHAPES
        return [
            None if c < 0 else (colours[c], shapes[s])
            for c, s in zip(self.scenes.colour[index], self.scenes.shape[index], strict=True)
        ]

    def draw_questions(self, index: int) -> list[TypedQuestion]:
        """Draw the questions about a scene, as (question type, question, answer)."""
        cells = self.cell_contents(index)
        rng = np.random.default_rng([self.seed, int(self.scenes.noise_seed[index])])
        candidates = {question_type: candidates_of(cells) for question_type, candidates_of in QUESTION_TYPES.items()}
        return draw_questions(candidates, self.questions_per_type, rng)


class SceneDescriptions(ShapeSamples):
    """The same scenes, each with one long answer that names the content of all grid cells in random order.

    The answer has a fact for each place in the image. A language model learns from it to find a place
    and to name the content, before it understands questions. LLaVA's first stage trains on captions for the same reason.
    """

    def draw_questions(self, index: int) -> list[TypedQuestion]:
        """Return the one request for a description, with its answer."""
        cells = self.cell_contents(index)
        order = np.random.default_rng([self.seed, int(self.scenes.noise_seed[index])]).permutation(len(cells))
        phrases = [f"{grid_cell_name(i, GRID_SIZE)} {' '.join(cells[i] or ('nothing',))}" for i in order]
        return [("description", "describe the picture", ", ".join(phrases))]


def load_shapes(split: str, count: int, seed: int = 0, questions_per_type: Mapping[str, int] = ONE_PER_TYPE) -> Split:
    """Generate a split of scenes with questions. The same arguments give the same bytes.

    Args:
        split: "train", "validation" or "test". No two splits share a layout.
        count: How many scenes.
        seed: Seed of scenes and questions.
        questions_per_type: How many questions of each type (a key of `QUESTION_TYPES`) each scene has.

    Raises:
        ValueError: If `count` is less than 1.
    """
    scenes = draw_scenes(split, seed, check_image_count(count, split))
    samples = ShapeSamples(split, scenes, seed, questions_per_type)
    arrays = [getattr(scenes, name).tobytes() for name in scenes.__dataclass_fields__]
    return Split(split, samples, fingerprint("shapes", split, count, seed, dict(questions_per_type), *arrays), count)


def require_shape_samples(train: Split | None) -> ShapeSamples:
    """Return the samples of a training split of scenes, whose grid cells are known.

    Raises:
        ValueError: If there is no training split, or it holds other data.
    """
    if train is None or not isinstance(train.samples, ShapeSamples):
        raise ValueError("model=scratch: pretraining needs scenes whose content is known; use it with data=shapes")
    return train.samples
