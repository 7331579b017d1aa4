import numpy as np
import pytest

from experiments.data import scenes
from experiments.data.scenes import CELL, COLOURS, GRID, SHAPES, Scenes, draw, render, split_of


def layouts(drawn: Scenes) -> set[bytes]:
    return {np.stack([c, s]).tobytes() for c, s in zip(drawn.colour, drawn.shape, strict=True)}


def test_same_seed_same_bytes_and_a_longer_split_begins_with_the_shorter():
    short, again, longer = draw("train", 3, 50), draw("train", 3, 50), draw("train", 3, 5000)
    assert render(short).tobytes() == render(again).tobytes()
    assert render(longer[:50]).tobytes() == render(short).tobytes()
    assert render(draw("train", 4, 50)).tobytes() != render(short).tobytes()


def test_splits_share_no_layout_whatever_the_seeds():
    train, validation, test = (
        layouts(draw(name, seed, 3000)) for name, seed in (("train", 0), ("validation", 1), ("test", 2))
    )
    assert not train & test
    assert not train & validation
    assert not validation & test


def test_split_depends_on_the_layout_alone():
    drawn = draw("test", 0, 200)
    assert (split_of(drawn.colour, drawn.shape) == 0).all()
    swapped = split_of(drawn.colour[:, ::-1], drawn.shape[:, ::-1])
    assert 0.02 < (swapped == 0).mean() < 0.25  # another layout, another tenth


def test_number_of_objects():
    filled = (draw("train", 0, 2000).colour >= 0).sum(1)
    assert filled.min() == scenes.MIN_OBJECTS
    assert filled.max() == GRID * GRID


def one(colour: int, shape: int, cell: int) -> Scenes:
    """A scene without noise in shape's place: one thing of known size in the middle of a cell."""
    size = (1, GRID * GRID)
    here = np.arange(GRID * GRID)[None] == cell
    return Scenes(
        colour=np.where(here, colour, -1),
        shape=np.where(here, shape, -1),
        centre=np.full((*size, 2), CELL / 2),
        radius=np.full(size, 6.0),
        noise_seed=np.array([7]),
    )


@pytest.mark.parametrize("cell", [0, 4, 5])
@pytest.mark.parametrize("colour", range(len(COLOURS)))
def test_a_square_is_painted_where_and_as_it_should_be(colour: int, cell: int):
    image = render(one(colour, SHAPES.index("square"), cell))[0].astype(float)
    row, column = divmod(cell, GRID)
    middle = image[row * CELL + 5 : row * CELL + 11, column * CELL + 5 : column * CELL + 11]
    assert np.abs(middle.mean((0, 1)) - list(COLOURS.values())[colour]).max() < 5
    outside = np.delete(image.reshape(GRID, CELL, GRID, CELL, 3).transpose(0, 2, 1, 3, 4).reshape(GRID**2, -1), cell, 0)
    assert abs(outside.mean() - 235) < 1


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("square", (2 * 0.9 * 6) ** 2),
        ("ring", np.pi * (6.0**2 - 3.0**2)),
        ("cross", 2 * 12 * 3.6 - 3.6**2),
        ("triangle", 0.5 * (1.8 * 6) * (2 * 0.9 * 6)),
    ],
)
def test_painted_area_is_the_shape_area(shape: str, area: float):
    red = np.array(COLOURS["red"])
    image = render(one(0, SHAPES.index(shape), 4))[0][CELL : 2 * CELL, CELL : 2 * CELL].astype(float)
    cover = (235 - image) @ (235 - red) / ((235 - red) @ (235 - red))  # least squares share of paint in each pixel
    assert cover.sum() == pytest.approx(area, rel=0.06)
