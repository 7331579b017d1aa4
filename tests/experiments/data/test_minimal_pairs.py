"""Minimal pairs: the pixels that differ, and answers that the pixels show."""

import re
from itertools import chain

import numpy as np
import pytest

from experiments.config.data_schema import LlavaJsonData, PhotosData, ShapesData, ShapesVideoData
from experiments.data.minimal_pairs import draw_minimal_pairs
from experiments.data.scenes import CELL_SIZE, COLOURS, GRID_SIZE, layout_tenth

COUNT = 20
ONE_CELL = ("colour", "shape", "count", "relation", "object")


@pytest.fixture(scope="module")
def shape_pairs():
    return draw_minimal_pairs(ShapesData("shapes"), COUNT)


def photo_data(photos, parts, seed=0):
    return PhotosData("photos", photos=str(photos), parts=parts, side=12, patch=4, seed=seed)


def pixels_of(pair):
    return [np.asarray(image()).astype(int) for image in pair.images]


def changed_cells(pair, grid_size):
    """Return the grid cells, in reading order, in which the images of a pair differ."""
    first, second = pixels_of(pair)
    side = first.shape[0] // grid_size
    differs = (first != second).any(-1).reshape(grid_size, side, grid_size, side).any((1, 3))
    return np.flatnonzero(differs).tolist()


def cell_colours(pixels):
    """Return the colour of the object in each grid cell, None in an empty one, from the pixels alone."""
    colours = []
    for row in range(GRID_SIZE):
        for column in range(GRID_SIZE):
            cell = pixels[row * CELL_SIZE :, column * CELL_SIZE :][:CELL_SIZE, :CELL_SIZE].reshape(-1, 3)
            painted = cell[np.ptp(cell, axis=1) > 60]  # grey pixels have equal channels
            distances = [np.abs(painted - rgb).sum(1).mean() if len(painted) else 0 for rgb in COLOURS.values()]
            colours.append(list(COLOURS)[int(np.argmin(distances))] if len(painted) else None)
    return colours


def test_draw_minimal_pairs_gives_the_number_of_pairs_of_each_property_that_is_asked(shape_pairs, photos):
    assert {name: len(pairs) for name, pairs in shape_pairs.items()} == dict.fromkeys(
        ["colour", "shape", "count", "place", "relation"], COUNT
    )
    pairs = draw_minimal_pairs(photo_data(photos, ["2x2", "3x3"]), 7)
    assert {name: len(chosen) for name, chosen in pairs.items()} == dict.fromkeys(
        ["object", "count", "place", "relation"], 7
    )


def test_draw_minimal_pairs_of_shapes_differ_in_the_cell_of_one_object(shape_pairs):
    for name, pairs in shape_pairs.items():
        for pair in pairs:
            cells = changed_cells(pair, GRID_SIZE)
            assert len(cells) == (1 if name in ONE_CELL else 2)
            before, after = (cell_colours(pixels) for pixels in pixels_of(pair))
            if name == "place":  # from one of the two cells into the other, which was empty
                assert {before[c] for c in cells} == {after[c] for c in cells}
                assert [before[c] is None for c in cells] == [after[c] is not None for c in cells]
                (filled,) = [c for c in cells if before[c] is not None]
                (target,) = [c for c in cells if after[c] is not None]
                boxes = [
                    pixels.reshape(GRID_SIZE, CELL_SIZE, GRID_SIZE, CELL_SIZE, 3)[c // GRID_SIZE, :, c % GRID_SIZE]
                    for pixels, c in zip(pixels_of(pair), (filled, target), strict=True)
                ]
                assert np.abs(boxes[0] - boxes[1]).mean() < 15, "the same object but for the noise of its cell"


def test_draw_minimal_pairs_of_shapes_have_the_answers_that_their_pixels_show(shape_pairs):
    checked = 0
    for pair in chain.from_iterable(shape_pairs.values()):
        shown = [cell_colours(pixels) for pixels in pixels_of(pair)]
        assert pair.answers[0] != pair.answers[1]
        if match := re.fullmatch(r"what colour is at row (\d) column (\d)\?", pair.question):
            cell = (int(match[1]) - 1) * GRID_SIZE + int(match[2]) - 1
            assert pair.answers == tuple(colours[cell] for colours in shown)
        elif match := re.fullmatch(r"how many (\w+) shapes are there\?", pair.question):
            assert pair.answers == tuple(str(colours.count(match[1])) for colours in shown)
        elif pair.property == "relation" and pair.question.startswith("what colour"):
            (cell,) = changed_cells(pair, GRID_SIZE)
            assert pair.answers == tuple(colours[cell] for colours in shown)
        else:
            continue
        checked += 1
    assert checked > 1.5 * COUNT


def test_draw_minimal_pairs_of_shapes_ask_about_what_differs(shape_pairs):
    starts = {
        "colour": "what colour is at row",
        "shape": "what shape is at row",
        "count": "how many",
        "place": "what",
        "relation": "what",
    }
    for name, pairs in shape_pairs.items():
        assert all(pair.question.startswith(starts[name]) for pair in pairs)
        assert all(pair.property == name for pair in pairs)


def test_draw_minimal_pairs_of_shapes_show_test_layouts_alone(shape_pairs):
    for pair in chain.from_iterable(shape_pairs.values()):
        for image in pair.images:
            (scene,) = image.args
            assert layout_tenth(scene.colour, scene.shape).tolist() == [0]


def test_draw_minimal_pairs_with_same_seed_are_same_and_begin_longer_lists(shape_pairs):
    again = draw_minimal_pairs(ShapesData("shapes"), COUNT)
    shorter = draw_minimal_pairs(ShapesData("shapes"), 5)
    other = draw_minimal_pairs(ShapesData("shapes", seed=1), 5)
    for name, pairs in shape_pairs.items():
        for a, b in zip(pairs, again[name], strict=True):
            assert (a.question, a.answers) == (b.question, b.answers)
            assert all((x == y).all() for x, y in zip(pixels_of(a), pixels_of(b), strict=True))
        assert [p.question for p in shorter[name]] == [p.question for p in pairs[:5]]
        assert [p.question for p in other[name]] != [p.question for p in pairs[:5]]


@pytest.mark.parametrize(("part", "grid"), [("2x2", 2), ("3x3", 3)])
def test_draw_minimal_pairs_of_photos_differ_in_one_photograph_or_in_the_order_of_two(photos, part, grid):
    for name, pairs in draw_minimal_pairs(photo_data(photos, ["one", part, "shapes"]), 9).items():
        for pair in pairs:
            cells = changed_cells(pair, grid)
            assert len(cells) == (1 if name in ONE_CELL else 2)
            if name == "place":
                first, second = pixels_of(pair)
                assert sorted(first.flatten()) == sorted(second.flatten())


def test_draw_minimal_pairs_of_photos_have_the_answers_that_their_pixels_show(photos):
    """The test photographs are uniform, and their grey level gives their class."""
    classes = ["airplane", "cat", "dog"]
    for name, pairs in draw_minimal_pairs(photo_data(photos, ["2x2"]), 12).items():
        for pair in pairs:
            shown = [
                [classes[(int(pixels[y, x, 0]) - 10) // 20 % 3] for y in (12, 36) for x in (12, 36)]
                for pixels in pixels_of(pair)
            ]
            names = [f"row {cell // 2 + 1} column {cell % 2 + 1}" for cell in range(4)]
            for answer, seen in zip(pair.answers, shown, strict=True):
                if name == "object":
                    assert answer == seen[names.index(pair.question[len("What is at ") : -1])]
                elif name == "count":
                    assert answer == str(seen.count(pair.question[:-1].split()[-1]))
                else:
                    direction, reference = re.fullmatch(r"What is (.+) the (\w+)\?", pair.question).groups()
                    step = {"left of": -1, "right of": 1, "above": -2, "below": 2}[direction]
                    assert answer == seen[seen.index(reference) + step]


def test_minimal_pair_sample_has_one_image_and_any_answer(shape_pairs):
    pair = shape_pairs["count"][0]
    sample = pair.sample(image=1, answer=0)
    assert sample.questions == [pair.question]
    assert sample.answers == [pair.answers[0]]
    assert (np.asarray(sample.image) == pixels_of(pair)[1]).all()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LlavaJsonData("llava_json", path="x", images="x"), "probe.swaps: data 'llava_json'"),
        (ShapesVideoData("shapes_video"), "probe.swaps: data 'shapes_video'"),
        (PhotosData("photos", photos="x", parts=["one", "shapes"]), r"data.parts.*\['one', 'shapes'\]"),
    ],
)
def test_draw_minimal_pairs_of_data_without_pairs_raises_value_error(config, message):
    with pytest.raises(ValueError, match=message) as error:
        draw_minimal_pairs(config, 1)
    assert "\n" not in str(error.value)


def test_draw_minimal_pairs_of_photos_of_one_class_raises_value_error(photos):
    with np.load(photos / "test.npz") as arrays:
        images = arrays["images"]
    np.savez(photos / "test.npz", images=images, labels=np.zeros(12, int))
    with pytest.raises(ValueError, match=r"probe.swap_pairs: .* 0 minimal pairs of 'object', not 3"):
        draw_minimal_pairs(photo_data(photos, ["2x2"]), 3)
