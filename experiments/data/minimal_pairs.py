"""Minimal pairs: two images that differ in one property of one object, and a question whose answer changes with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations, product
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int
from PIL import Image

from experiments.config.data_schema import DataConfig, PhotosData, ShapesData
from experiments.data.balanced_questions import QuestionAnswer
from experiments.data.photo_questions import photo_grid_questions
from experiments.data.photos import GRID_SIZES, PhotoGridSamples, read_photos
from experiments.data.samples import Sample, llava_conversation
from experiments.data.scenes import COLOURS, SHAPES, SPLIT_TENTHS, Scenes, draw_scenes, layout_tenth, render_scenes
from experiments.data.shapes import (
    ONE_PER_TYPE,
    ShapeSamples,
    count_questions,
    place_questions,
    relation_questions,
)

SPLIT = "test"
MAX_SCENES_PER_PAIR = 200  # a property that so few scenes have is not worth drawing
Content = Any  # of a grid cell: colour and shape, or class of a photograph


@dataclass(frozen=True)
class MinimalPair:
    """Two images and one question.

    Args:
        property: The property that differs.
        question: The question.
        answers: The right answer to each image; they differ.
        images: Render the images.
    """

    property: str
    question: str
    answers: tuple[str, str]
    images: tuple[Callable[[], Image.Image], Callable[[], Image.Image]]

    def sample(self, image: int, answer: int, name: str = "") -> Sample:
        """Return the question about one of the images as a sample.

        Args:
            image: 0 or 1, the image.
            answer: 0 or 1, the image whose answer follows the question.
            name: Id of the sample.
        """
        turns = llava_conversation([(self.question, self.answers[answer])])
        return Sample(name or f"{self.property}-{image}", (self.images[image],), turns, [self.property])


class _Change(NamedTuple):
    """A change of a scene: the content of its grid cells afterwards, and what renders it."""

    cells: list[Content]
    render: Callable[[], Image.Image]


class _Scene(NamedTuple):
    """A scene, its changes in random order by what they alter, and its questions by type."""

    cells: list[Content]
    render: Callable[[], Image.Image]
    changes: Callable[[str, np.random.Generator], Iterator[_Change]]
    questions: Mapping[str, Callable[[Sequence[Content]], Sequence[QuestionAnswer]]]


# For each property: what changes, and the type of the question that asks for it.
_SHAPE_PROPERTIES = {
    "colour": ("colour", "place"),
    "shape": ("shape", "place"),
    "count": ("colour or shape", "count"),
    "place": ("place", "relation"),
    "relation": ("colour or shape", "relation"),
}
_PHOTO_PROPERTIES = {
    "object": ("object", "place"),
    "count": ("object", "count"),
    "place": ("place", "beside"),
    "relation": ("object", "beside"),
}


def draw_minimal_pairs(config: DataConfig, count: int) -> dict[str, list[MinimalPair]]:
    """Draw minimal pairs of every property from scenes of a data set's test split.

    Scenes of shapes differ in one object. All other pixels are equal:

    - colour, shape: of the object in a grid cell ("what colour is at row 1 column 2?"),
    - count: how many objects have a colour or a shape, as one object changes it,
    - relation: the colour or shape of the nearest object beside another one, as that nearest object changes it,
    - place: the same question, as an object moves to an empty cell.

    Grids of photographs differ in one photograph, or in the order of two: object (what is in a cell), count, relation
    (what is beside another photograph), and place (the same question, as two photographs change places). No question
    asks where a photograph is: its answers are too few words to tell a model that knows them from one that guesses.

    Args:
        config: The data config; its seed is that of the pairs.
        count: How many pairs of each property, each of another scene.

    Returns:
        The pairs by property. The same arguments give the same pairs, and a longer list begins with the shorter one.

    Raises:
        ValueError: If the data set has no minimal pairs, or its photographs allow too few.
        FileNotFoundError: If a file of photographs is missing.

    Example:
        >>> pair = draw_minimal_pairs(ShapesData("shapes", seed=0), 1)["colour"][0]
        >>> pair.question[:11], pair.answers[0] in COLOURS, pair.answers[0] != pair.answers[1]
        ('what colour', True, True)
    """
    check_minimal_pairs(config)
    if isinstance(config, PhotosData):
        properties, scenes_of = _PHOTO_PROPERTIES, partial(_photo_scenes, config)
    else:
        properties, scenes_of = _SHAPE_PROPERTIES, partial(_shape_scenes, config.seed)
    return {
        name: _draw(name, *properties[name], scenes_of(count * MAX_SCENES_PER_PAIR), count, [config.seed, number])
        for number, name in enumerate(properties)
    }


def check_minimal_pairs(config: DataConfig) -> None:
    """Check that a data set has minimal pairs.

    Raises:
        ValueError: If it has none.
    """
    if isinstance(config, PhotosData) and not _grid_sizes(config):
        raise ValueError(
            f"probe.swaps: minimal pairs need a grid of photographs in data.parts, 2x2 or 3x3, found {list(config.parts)}"
        )
    if not isinstance(config, ShapesData | PhotosData):
        raise ValueError(f"probe.swaps: data '{config.name}' has no minimal pairs; use shapes or photos")


def _draw(
    name: str, altered: str, question_type: str, scenes: Iterator[_Scene], count: int, seed: list[int]
) -> list[MinimalPair]:
    """Draw pairs of one property from scenes, at most one of each scene."""
    pairs: list[MinimalPair] = []
    for number, scene in enumerate(scenes):
        rng = np.random.default_rng([*seed, number])
        questions_of = scene.questions[question_type]
        before = dict(questions_of(scene.cells))
        for change in scene.changes(altered, rng):
            after = dict(questions_of(change.cells))
            if options := [
                question for question in before if after.get(question, before[question]) != before[question]
            ]:
                question = options[rng.integers(len(options))]
                answers = (before[question], after[question])
                pairs.append(MinimalPair(name, question, answers, (scene.render, change.render)))
                break
        if len(pairs) == count:
            return pairs
    raise ValueError(f"probe.swap_pairs: the data allow {len(pairs)} minimal pairs of '{name}', not {count}")


def _shape_scenes(seed: int, count: int) -> Iterator[_Scene]:
    """Yield at most `count` scenes of shapes of the test split."""
    drawn = block = 0
    questions = {"place": place_questions, "count": count_questions, "relation": relation_questions}
    while drawn < count:
        block = max(2 * block, 256)
        scenes = draw_scenes(SPLIT, seed, block)
        for index in range(drawn, min(block, count)):
            scene = scenes[index : index + 1]
            yield _Scene(_cell_contents(scene), partial(_render, scene), partial(_shape_changes, scene), questions)
        drawn = min(block, count)


def _cell_contents(scene: Scenes) -> list[Content]:
    return ShapeSamples(SPLIT, scene, 0, ONE_PER_TYPE).cell_contents(0)


def _render(scene: Scenes) -> Image.Image:
    return Image.fromarray(render_scenes(scene)[0])


def _shape_changes(scene: Scenes, altered: str, rng: np.random.Generator) -> Iterator[_Change]:
    """Yield the scenes of the test split that differ from a scene in one object, in random order.

    Args:
        scene: A scene.
        altered: "colour", "shape", "colour or shape" or "place" of the object.
        rng: Source of the order.
    """
    filled, empty = np.flatnonzero(scene.colour[0] >= 0), np.flatnonzero(scene.colour[0] < 0)
    changed: list[Scenes] = []
    for name, values in (("colour", len(COLOURS)), ("shape", len(SHAPES))):
        for cell in filled if name in altered.split(" or ") else ():
            for value in set(range(values)) - {int(getattr(scene, name)[0, cell])}:
                array = getattr(scene, name).copy()
                array[0, cell] = value
                changed.append(replace(scene, **{name: array}))
    for cell, target in product(filled, empty) if altered == "place" else ():
        order = np.arange(scene.colour.shape[1])
        order[[cell, target]] = target, cell
        # The object keeps its size and its offset in the cell.
        names = ("colour", "shape", "centre", "radius")
        changed.append(replace(scene, **{name: getattr(scene, name)[:, order] for name in names}))
    for index in rng.permutation(len(changed)):
        other = changed[index]
        if int(layout_tenth(other.colour, other.shape)[0]) in SPLIT_TENTHS[SPLIT]:  # none of training
            yield _Change(_cell_contents(other), partial(_render, other))


def _grid_sizes(config: PhotosData) -> list[int]:
    return [GRID_SIZES[part] for part in config.parts if GRID_SIZES.get(part, 1) > 1]


def _photo_scenes(config: PhotosData, count: int) -> Iterator[_Scene]:
    """Yield grids of photographs of the test split, the grid sizes in turn."""
    photos, _ = read_photos(config.photos, SPLIT)
    sizes = _grid_sizes(config)
    grids = [PhotoGridSamples(SPLIT, photos, count, config.seed, s, config.side, config.patch, "no") for s in sizes]
    for number in range(count):
        grid = grids[number % len(grids)]
        indices = grid.photo_indices[number // len(grids)]

        def questions(question_type: str, names: Sequence[str], size: int = grid.grid_size) -> Sequence[QuestionAnswer]:
            return photo_grid_questions(names, photos.classes, size)[question_type]

        yield _Scene(
            [photos.classes[label] for label in photos.labels[indices]],
            partial(grid.render_photos, indices),
            partial(_photo_changes, grid, indices),
            {question_type: partial(questions, question_type) for question_type in ("place", "count", "beside")},
        )


def _photo_changes(
    grid: PhotoGridSamples, indices: Int[np.ndarray, " cells"], altered: str, rng: np.random.Generator
) -> Iterator[_Change]:
    """Yield grids that differ from one in a photograph, or in the order of two photographs, in random order.

    Args:
        grid: The samples that render grids.
        indices: The grid's photographs, in reading order.
        altered: "object" for another photograph of another class, "place" for another order.
        rng: Source of the order and of the other photographs.
    """
    labels, classes = grid.photos.labels, grid.photos.classes
    cells = range(len(indices))
    for cell, second in rng.permutation(
        list(combinations(cells, 2)) if altered == "place" else [(c, c) for c in cells]
    ):
        new = indices.copy()
        new[[cell, second]] = indices[[second, cell]]
        others = np.flatnonzero(labels != labels[indices[cell]])
        if altered == "object" and len(others):
            new[cell] = others[rng.integers(len(others))]
        yield _Change([classes[label] for label in labels[new]], partial(grid.render_photos, new))
