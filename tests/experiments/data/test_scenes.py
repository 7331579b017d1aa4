"""Scenes of shapes and their pixels."""

import numpy as np
import pytest

from experiments.data import scenes
from experiments.data.scenes import (
    CELL_SIZE,
    COLOURS,
    GRID_SIZE,
    SHAPES,
    Scenes,
    draw_scenes,
    layout_tenth,
    render_scenes,
)


def layouts(drawn: Scenes) -> set[bytes]:
    return {np.stack([c, s]).tobytes() for c, s in zip(drawn.colour, drawn.shape, strict=True)}


def test_draw_scenes_is_deterministic_and_a_longer_split_begins_with_the_shorter():
    short, again, longer = draw_scenes("train", 3, 50), draw_scenes("train", 3, 50), draw_scenes("train", 3, 5000)
    assert render_scenes(short).tobytes() == render_scenes(again).tobytes()
    assert render_scenes(longer[:50]).tobytes() == render_scenes(short).tobytes()
    assert render_scenes(draw_scenes("train", 4, 50)).tobytes() != render_scenes(short).tobytes()


def test_draw_scenes_of_two_splits_share_no_layout():
    train, validation, test = (
        layouts(draw_scenes(name, seed, 3000)) for name, seed in (("train", 0), ("validation", 1), ("test", 2))
    )
    assert not train & test
    assert not train & validation
    assert not validation & test


def test_layout_tenth_depends_on_the_layout_alone():
    drawn = draw_scenes("test", 0, 200)
    assert (layout_tenth(drawn.colour, drawn.shape) == 0).all()
    swapped = layout_tenth(drawn.colour[:, ::-1], drawn.shape[:, ::-1])
    assert 0.02 < (swapped == 0).mean() < 0.25  # another layout, another tenth


def test_draw_scenes_have_five_to_nine_objects_that_stay_in_their_grid_cells():
    drawn = draw_scenes("train", 0, 2000)
    filled = (drawn.colour >= 0).sum(1)
    assert (filled.min(), filled.max()) == (5, 9) == (scenes.MIN_OBJECTS, scenes.MAX_OBJECTS)
    reach = drawn.radius[..., None] + 0.5  # pixels, with the soft edge
    assert (drawn.centre - reach >= 0).all()
    assert (drawn.centre + reach <= CELL_SIZE).all()


RADIUS = 5.0  # pixels


def single_object_scene(colour: int, shape: int, cell: int) -> Scenes:
    """Return a scene with one object of known size in the middle of a grid cell."""
    size = (1, GRID_SIZE * GRID_SIZE)
    here = np.arange(GRID_SIZE * GRID_SIZE)[None] == cell
    return Scenes(
        colour=np.where(here, colour, -1),
        shape=np.where(here, shape, -1),
        centre=np.full((*size, 2), CELL_SIZE / 2),
        radius=np.full(size, RADIUS),
        noise_seed=np.array([7]),
    )


@pytest.mark.parametrize("cell", [0, 5, 7])
@pytest.mark.parametrize("colour", range(len(COLOURS)))
def test_render_scenes_paints_a_square_in_its_colour_and_grid_cell(colour: int, cell: int):
    image = render_scenes(single_object_scene(colour, SHAPES.index("square"), cell))[0].astype(float)
    row, column = divmod(cell, GRID_SIZE)
    middle = image[row * CELL_SIZE + 3 : row * CELL_SIZE + 9, column * CELL_SIZE + 3 : column * CELL_SIZE + 9]
    assert np.abs(middle.mean((0, 1)) - list(COLOURS.values())[colour]).max() < 5
    outside = np.delete(
        image.reshape(GRID_SIZE, CELL_SIZE, GRID_SIZE, CELL_SIZE, 3).transpose(0, 2, 1, 3, 4).reshape(GRID_SIZE**2, -1),
        cell,
        0,
    )
    assert abs(outside.mean() - 235) < 1


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("square", (2 * 0.9 * RADIUS) ** 2),
        ("ring", np.pi * (RADIUS**2 - (RADIUS / 2) ** 2)),
        ("cross", 2 * (2 * RADIUS) * (0.6 * RADIUS) - (0.6 * RADIUS) ** 2),
        ("triangle", 0.5 * (1.8 * RADIUS) * (2 * 0.9 * RADIUS)),
    ],
)
def test_render_scenes_paints_the_area_of_the_shape(shape: str, area: float):
    red = np.array(COLOURS["red"])
    image = render_scenes(single_object_scene(0, SHAPES.index(shape), 5))[0][
        CELL_SIZE : 2 * CELL_SIZE, CELL_SIZE : 2 * CELL_SIZE
    ].astype(float)
    cover = (235 - image) @ (235 - red) / ((235 - red) @ (235 - red))  # least squares share of paint in each pixel
    assert cover.sum() == pytest.approx(area, rel=0.06)
